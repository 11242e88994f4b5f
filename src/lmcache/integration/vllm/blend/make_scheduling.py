"""Puts the scheduler role's half of CacheBlend together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.blend.find_passages import PassageFinder, PromptCutter
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.blend.options import BlendDefaults
from lmcache.integration.vllm.blend.scheduling import BlendScheduling, Finder
from lmcache.integration.vllm.parallel.ranked_cache import RankedCache
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.segmentation.token_text import Tokenizer

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def make_scheduling(shared: SharedEngine | RankedCache, vllm_config: VllmConfig) -> BlendScheduling | None:
    """None when the configuration has CacheBlend off.

    Raises:
        ValueError: the configuration cannot work with this model.
    """
    config = shared.config
    if not config.enable_blending:
        return None
    tokenizer = _tokenizer(config, vllm_config)
    finder: Finder
    if isinstance(shared, RankedCache):
        finder = shared.make_finder(PromptCutter(config, tokenizer))
    else:
        manager = shared.manager
        assert manager.passages is not None
        finder = PassageFinder(shared.engine, manager.passages, config, tokenizer, manager.shared_passages)
    block_size = vllm_config.cache_config.block_size
    max_rows = vllm_config.scheduler_config.max_num_batched_tokens
    return BlendScheduling(finder, BlendDefaults(config), config, shared.metrics, block_size, max_rows)


def _tokenizer(config: LMCacheEngineConfig, vllm_config: VllmConfig) -> Tokenizer | None:
    """The model's, where passages may be told in text."""
    model = vllm_config.model_config
    if config.blend_segmentation == "automatic" or model.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer: Tokenizer = cached_tokenizer_from_config(model)
    return tokenizer
