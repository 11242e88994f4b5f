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

from lmcache.blend.attention import QueryMask
from lmcache.blend.rope import FusedRope
from tests.blend_mistakes import BOTTOM_RIGHT, UNROTATED, bottom_right, unrotated
from tests.sglang.blend.faults import STEPS
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
    _mistake(file, UNROTATED, FusedRope, "fused_encode", unrotated)
    _mistake(file, BOTTOM_RIGHT, QueryMask, "__init__", bottom_right)


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
