"""SGLang's ``launch_server`` with :mod:`tests.sglang.generation_c.probe` in it, and faults in the blend on demand.

``fault`` in the folder PROBE_FOLDER holds the name of one of STEPS (raise there) or of MISTAKES (blend wrongly).
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
from pathlib import Path
from typing import Any

import torch

from lmcache.blend.attention import QueryMask
from lmcache.blend.rope import FusedRope
from tests.sglang.blend.faults import MISTAKES, STEPS
from tests.sglang.generation_c import probe


def install(folder: Path) -> None:
    file = folder / "fault"
    probe.install(folder)
    asked = probe._Fault(file)
    for fault in STEPS:
        module, _, path = fault.partition(":")
        owner_name, name = path.split(".")
        owner = getattr(importlib.import_module(f"lmcache.{module}"), owner_name)
        setattr(owner, name, probe._breakable(asked, fault, getattr(owner, name)))
    _mistake(file, MISTAKES[0], FusedRope, "fused_encode", lambda self, old, new, k, **lengths: k)
    made = QueryMask.__init__

    def bottom_right(self: QueryMask, positions: torch.Tensor, *arguments: Any) -> None:
        """The mask of a kernel that takes the rows for the last ones of the prompt."""
        last = int(positions[-1])
        made(self, torch.arange(last + 1 - len(positions), last + 1), *arguments)

    _mistake(file, MISTAKES[1], QueryMask, "__init__", bottom_right)


def _mistake(file: Path, mistake: str, owner: type[Any], name: str, wrong: Any) -> None:
    right = getattr(owner, name)

    @functools.wraps(right)
    def method(*args: Any, **kwargs: Any) -> Any:
        made = file.exists() and file.read_text() == mistake
        return (wrong if made else right)(*args, **kwargs)

    setattr(owner, name, method)


if "PROBE_FOLDER" in os.environ:
    install(Path(os.environ["PROBE_FOLDER"]))

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
