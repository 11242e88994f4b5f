"""Public import path; see :mod:`lmcache.memory.memory_obj`."""

from lmcache.memory.memory_obj import MemoryObj

__all__ = ["MemoryObj"]
