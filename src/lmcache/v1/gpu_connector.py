"""Public import path; see :mod:`lmcache.paging.interface`."""

from lmcache.paging.interface import GPUConnectorInterface

__all__ = ["GPUConnectorInterface"]
