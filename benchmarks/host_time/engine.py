"""Both roles of our connector in one process, with vLLM's own request objects, a cache and no vLLM engine."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from benchmarks.host_time.stand_ins import DIM, HEADS, LAYERS, STAGING_BYTES, FirstCopy, Model, stand_in_stream
from lmcache.blend.rope import FusedRope, RopeFrequencies
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.blend.options import BlendDefaults
from lmcache.integration.vllm.blend.blender import Blender
from lmcache.integration.vllm.blend.make_scheduling import make_scheduling
from lmcache.integration.vllm.scheduler_side import SchedulerSide
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.integration.vllm.worker_side import WorkerSide
from lmcache.manager import LMCacheManager
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.paging.detect import PageHints, detect_layout
from lmcache.paging.staged_connector import StagedConnector
from lmcache.paging.token_connector import TokenConnector

CHUNK, BLOCK = 256, 16


@dataclass
class Answer:
    """``until_copy``: seconds from the request's arrival at the scheduler role to the first copy (of a blend: of its
    passages), without what vLLM itself does in between; ``total``: to the end of the worker role's step.
    ``disturbed``: the system took the core away meanwhile."""

    until_copy: float
    total: float
    disturbed: bool
    summary: dict[str, Any]


class HostEngine:
    def __init__(self, num_tokens: int, first_copy: FirstCopy, memory_gb: float = 2.0) -> None:
        """``num_tokens``: of the longest prompt; ``memory_gb``: for chunks."""
        self._first_copy = first_copy
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK, enable_blending=True, max_local_cpu_size=memory_gb, blend_corrector="none"
        )
        shape = (LAYERS, 2, CHUNK, HEADS, DIM)
        self.shared = SharedEngine(LMCacheManager(config, LMCacheEngineMetadata("model", kv_shape=shape)))
        self._blocks = list(range(7, 7 + -(-num_tokens // BLOCK)))
        room = torch.zeros(LAYERS, len(self._blocks) + 7, 2, BLOCK, HEADS, DIM, dtype=torch.bfloat16)
        tensors = list(room.unbind(0))
        hints = PageHints(BLOCK, HEADS, DIM, backend="FLASH_ATTN", engine="none")
        layout = detect_layout({str(layer): tensor for layer, tensor in enumerate(tensors)}, hints)
        self._writing, self._reading = TokenConnector(layout, tensors), StagedConnector(layout, tensors)
        ring = self._reading._in
        for _ in range(3):
            ring.take(64 << 20 >> 7)
        stand_in_stream(ring)
        for _ in range(2):
            self._reading._out.take(64 << 20 >> 7)
        stand_in_stream(self._reading._out)
        frequencies = 1.0 / (10_000.0 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))
        rope = FusedRope(RopeFrequencies(frequencies), head_size=DIM)
        blender = Blender(cast(Any, Model()), [rope] * LAYERS, self._reading, max_rows=1 << 16)
        assert blender._ring is not None
        blender._ring.kept_bytes = STAGING_BYTES
        blender._ring._room = torch.empty(STAGING_BYTES // 2, dtype=torch.bfloat16)
        stand_in_stream(blender._ring)
        self.shared.blender = blender
        self.shared.engine.set_gpu_connector(self._reading)
        vllm_config = cast(
            Any,
            SimpleNamespace(
                cache_config=SimpleNamespace(block_size=BLOCK),
                parallel_config=SimpleNamespace(rank=0),
                scheduler_config=SimpleNamespace(max_num_batched_tokens=1 << 16),
                model_config=SimpleNamespace(skip_tokenizer_init=True),
            ),
        )
        self._scheduler = SchedulerSide(self.shared, partial(make_scheduling, self.shared, vllm_config))
        self._in_step = False
        self._worker = WorkerSide(self.shared, vllm_config, lambda: self._in_step)
        self._worker._blend_defaults = BlendDefaults(config)
        self._number = 0

    def keep(self, tokens: list[int]) -> None:
        """Ask with a prompt and let what it computed be stored."""
        self.shared.engine.set_gpu_connector(self._writing)
        self.compute(tokens)
        self.shared.engine.set_gpu_connector(self._reading)

    def compute(self, tokens: list[int]) -> None:
        """As vLLM computes a prompt of which nothing is reused, until it is saved."""
        self.ask(tokens, {"lmcache.blend": False, "lmcache.skip_load": True})
        self.shared.saves.wait()

    def ask(self, tokens: list[int], params: dict[str, Any] | None = None) -> Answer:
        request, output = self._request(tokens, params)
        scheduler, worker = self._scheduler, self._worker
        self._first_copy.at = None
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
        start = time.perf_counter()
        matched = scheduler.get_num_new_matched_tokens(request, 0)
        assert matched is not None
        scheduler.update_state_after_alloc(request, matched)
        output.num_scheduled_tokens[request.request_id] = len(tokens) - matched
        output.scheduled_new_reqs[0].num_computed_tokens = matched
        meta = scheduler.build_connector_meta(cast(Any, output))
        self._in_step = True
        worker.bind_connector_metadata(meta)
        worker.start_load_kv(meta)
        until_copy = (self._first_copy.at or time.perf_counter()) - start
        worker.wait_for_save()
        self._in_step = False
        total = time.perf_counter() - start
        disturbed = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw != before
        assert not self.shared.failed_loads, self.shared.failed_loads
        self.shared.saves.wait()
        _, summary = scheduler.request_finished(request, self._blocks)
        assert summary is not None
        worker.get_finished()
        return Answer(until_copy, total, disturbed, summary["lmcache"])

    def close(self) -> None:
        self._scheduler.close()
        self.shared.saves.close()
        self.shared.manager.close()

    def _request(self, tokens: list[int], params: dict[str, Any] | None) -> tuple[Request, SimpleNamespace]:
        self._number += 1
        name = str(self._number)
        extra = {"kv_transfer_params": params} if params else None
        request = Request(name, tokens, SamplingParams(max_tokens=1, extra_args=extra), None)
        request.block_hashes = [index.to_bytes(32, "little") for index in range(len(tokens) // BLOCK)]  # type: ignore[misc]
        request.status = RequestStatus.WAITING
        blocks = self._blocks[: -(-len(tokens) // BLOCK)]
        new = SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=0)
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
        return request, SimpleNamespace(
            scheduled_new_reqs=[new], scheduled_cached_reqs=cached, num_scheduled_tokens={name: 0}
        )
