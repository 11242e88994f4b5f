"""Where vLLM has put the two roles of a connector, and where each rank keeps what it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.config import LMCacheEngineConfig
from lmcache.storage.disk.rank_directories import RankDirectory

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def roles_share_a_process(vllm_config: VllmConfig) -> bool:
    parallel = vllm_config.parallel_config
    return parallel.world_size == 1 and parallel.distributed_executor_backend in (None, "uni")


def reason_against(vllm_config: VllmConfig) -> str | None:
    """Why the ranks of this vLLM cannot serve; None when they can."""
    parallel = vllm_config.parallel_config
    backend = parallel.distributed_executor_backend
    if not roles_share_a_process(vllm_config) and backend not in ("mp", "uni", None):
        return (
            f"--distributed-executor-backend {backend}: only 'mp' and 'uni' are supported so far, because all ranks "
            "must be children of the scheduler's process"
        )
    if getattr(parallel, "nnodes", 1) > 1:
        return f"the ranks are spread over {parallel.nnodes} hosts: only one is supported so far"
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        return "under context parallelism no rank has all tokens"
    if parallel.pipeline_parallel_size > 1:
        return f"pipeline parallel size is {parallel.pipeline_parallel_size}: only 1 is supported so far"
    return None


def config_of_rank(config: LMCacheEngineConfig, rank: int, world_size: int) -> LMCacheEngineConfig:
    """The configuration of one rank: sizes are for each rank, and each has a folder of its own on the disk."""
    if config.local_disk is None:
        return config
    return config.model_copy(update={"local_disk": RankDirectory.of(config.local_disk, rank, world_size).path})
