"""Public import path; see :mod:`lmcache.observability.logging`."""

from lmcache.observability.logging import init_logger

__all__ = ["init_logger"]
