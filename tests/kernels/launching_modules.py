"""The modules that launch kernels, for tests that look at what is launched."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

import lmcache.kernels
from lmcache.kernels import launch


def launching_modules() -> list[ModuleType]:
    """Those that have :func:`lmcache.kernels.launch.launch` as their own ``launch``, all of them loaded."""
    modules = [
        import_module(found.name) for found in pkgutil.iter_modules(lmcache.kernels.__path__, "lmcache.kernels.")
    ]
    return [user for user in modules if user is not launch and getattr(user, "launch", None) is launch.launch]
