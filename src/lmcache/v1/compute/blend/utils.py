"""The public import path of ``LMCBlenderBuilder``."""

from lmcache.blend.lmc_blender import LMCBlenderBuilder

__all__ = ["LMCBlenderBuilder"]
