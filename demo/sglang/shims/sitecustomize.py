"""Python imports this module at start, in SGLang's child processes too, since the folder is in their ``PYTHONPATH``.

SGLang imports torchvision even for a text model. PyPI's torchvision is built for CUDA, and its C++ operators do not
load next to a PyTorch for CPUs. It goes on without them, but then describes two of them to PyTorch that no one has
declared, which is an error. Here they are declared, after torchvision tried its own; nothing calls them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

DESCRIBED_BY = "torchvision._meta_registrations"
OPERATORS = ("nms", "qnms")
_libraries: list[Any] = []  # a torch.library.Library takes its declarations along when it goes


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing, but is asked just before the module that needs the declarations is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == DESCRIBED_BY:
            sys.meta_path.remove(self)
            if not sys.modules["torchvision.extension"]._has_ops():
                import torch

                library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
                for operator in OPERATORS:
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _libraries.append(library)
        return None


sys.meta_path.insert(0, DeclareOperators())
