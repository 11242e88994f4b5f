"""The public import path of ``LMCBlender``."""

from lmcache.blend.lmc_blender import LMCBlender

__all__ = ["LMCBlender"]
