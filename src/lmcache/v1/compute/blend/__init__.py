"""The public import path of CacheBlend over an engine's pages."""

from lmcache.blend.lmc_blender import LMCBlender, LMCBlenderBuilder
from lmcache.blend.rope import FusedRope

__all__ = ["FusedRope", "LMCBlender", "LMCBlenderBuilder"]
