"""What vLLM calls in every one of its processes at start: the entry point of the group ``vllm.general_plugins``.

It lets CacheBlend find the model that vLLM loads. With ``VLLM_PLUGINS`` set, it runs only where that names ``lmcache``.
"""

from __future__ import annotations

from lmcache.observability.logging import init_logger

logger = init_logger(__name__)


def register() -> None:
    """Idempotent, and never raises: vLLM would not start."""
    try:
        from lmcache.integration.vllm.blend.model_finder import watch_modules

        watch_modules()
    except Exception as error:
        logger.warning("The plug-in failed; CacheBlend looks for the model in another way: %r", error)
