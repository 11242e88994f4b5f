"""CacheBlend for plain transformers: ``CacheBlend(model)``. No file of transformers is patched."""

from lmcache.integration.transformers.blended_prompt import BlendedPrompt, BlendReport
from lmcache.integration.transformers.blender import CacheBlend
from lmcache.integration.transformers.model_identity import engine_metadata
from lmcache.integration.transformers.supported import UnsupportedModelError

__all__ = ["BlendReport", "BlendedPrompt", "CacheBlend", "UnsupportedModelError", "engine_metadata"]
