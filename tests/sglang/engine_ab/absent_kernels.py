"""`sgl_kernel` by name only: SGLang 0.5.12 imports its CUDA kernels wherever it runs, and calls none of them on a CPU
with `torch_native` attention."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

NAME = "sgl_kernel"
PARTS = (NAME, f"{NAME}.flash_attn", f"{NAME}.kvcacheio")
"""Those that are imported at any rate. SGLang looks whether the others are there."""


class _Kernels(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{self.__name__}.{name} is not there: this SGLang runs without {NAME}")

        kernel.__name__ = name
        return kernel


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PARTS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Kernels(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def install() -> None:
    sys.meta_path.insert(0, _Finder())
