"""Puts CacheBlend together for a rank of SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmcache.blend.find_passages import PassageFinder
from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.guard import report_failure
from lmcache.integration.sglang.blend.scheduler_access import SchedulerAccess
from lmcache.integration.sglang.shared_engine import RankOf
from lmcache.manager import LMCacheManager
from lmcache.observability.logging import init_logger
from lmcache.paging.paged_connector import PagedConnector

if TYPE_CHECKING:
    from lmcache.integration.sglang.blend.planning import BlendPlanning

logger = init_logger(__name__)


def make_planning(
    manager: LMCacheManager,
    access: SchedulerAccess | None,
    rank: RankOf,
    page_size: int,
    groups: Sequence[Any],
) -> BlendPlanning | None:
    """None where CacheBlend is off, or cannot be on: the log says why, and prefixes are reused as ever.

    Raises:
        ValueError: the configuration cannot work with this model.
    """
    known, config, engine = manager.passages, manager.config, manager.engine
    if known is None:
        return None
    # These import SGLang, which the rest of the connector does without.
    from lmcache.integration.sglang.blend.blender import Blender
    from lmcache.integration.sglang.blend.planning import BlendPlanning

    try:
        if access is None:
            raise UnsupportedModelError(None, "SGLang's scheduler was not found among the callers")
        if rank.pp_size > 1:
            raise UnsupportedModelError(None, "under pipeline parallelism no rank has all layers")
        assert isinstance(engine.gpu_connector, PagedConnector)
        blender = Blender(access.model_runner, engine.gpu_connector, groups)
    except UnsupportedModelError as error:
        engine.metrics.blend_fallback("model")
        logger.warning("CacheBlend is off: %s", error)
        return None
    except Exception as error:
        report_failure(engine.metrics, "blend_start", error)
        return None
    tokenizer = None if config.blend_segmentation == "automatic" else access.tokenizer
    finder = PassageFinder(engine, known, config, tokenizer, manager.shared_passages)
    logger.info("CacheBlend is on: policy %s", config.blend_policy)
    return BlendPlanning(engine, known, finder, blender, access, page_size, groups)
