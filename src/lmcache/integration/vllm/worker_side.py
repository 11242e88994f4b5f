"""The worker role: moves KV between vLLM's pages and the cache, around each forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
import vllm

from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.blend.options import BlendDefaults
from lmcache.integration.guard import never_raise, report_failure
from lmcache.integration.vllm.attention_writer import AttentionWriter
from lmcache.integration.vllm.blend.blender import Blender, BlendReport, PagedRequest, report_of
from lmcache.integration.vllm.blend.scheduling import PreparedBlend
from lmcache.integration.vllm.connector_metadata import (
    BlendOp,
    LMCacheConnectorMetadata,
    LoadOp,
)
from lmcache.integration.vllm.deferred_release import Releasable
from lmcache.integration.vllm.early_start import EarlyStart
from lmcache.integration.vllm.layerwise import LayerwiseLoads, calls_layer_hooks
from lmcache.integration.vllm.lost_loads import LostLoads
from lmcache.integration.vllm.page_saves import PageSaves, slot_mapping
from lmcache.integration.vllm.parallel.agreement import TensorParallelAgreement
from lmcache.integration.vllm.parallel.planned_blends import take_blend
from lmcache.integration.vllm.prometheus import LMCacheStats, StatsTeller
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.memory.one_thread import one_thread
from lmcache.observability.events import CacheStoreEvent
from lmcache.observability.hook_times import HookTimes, engine_hook
from lmcache.observability.logging import init_logger
from lmcache.observability.metrics import Metrics
from lmcache.observability.ranges import Range
from lmcache.paging.detect import PageHints, detect_layout
from lmcache.paging.make_connector import make_connector
from lmcache.paging.paged_connector import PagedConnector
from lmcache.paging.verify import verify_layout

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext

logger = init_logger(__name__)


class WorkerSide:
    """Runs one step's :class:`LMCacheConnectorMetadata`: loads before the forward, saves after it."""

    def __init__(
        self,
        shared: SharedEngine,
        vllm_config: VllmConfig,
        in_step: Callable[[], bool],
        agreement: TensorParallelAgreement | None = None,
    ) -> None:
        """``in_step``: whether vLLM is in one. ``agreement``: with the other ranks, where there are any."""
        self._shared = shared
        self._agreement = agreement
        self._engine = shared.engine
        self._vllm_config = vllm_config
        self._block_size: int = vllm_config.cache_config.block_size
        self._device = torch.device("cpu")
        self._meta: LMCacheConnectorMetadata | None = None
        self._early = EarlyStart(in_step)
        shared.begins_early = self.begin_early
        self._blend_defaults: BlendDefaults | None = None
        self._lost = LostLoads(shared, vllm_config, agreement)
        self._layerwise = LayerwiseLoads(self._lost.give_up)
        self._page_saves = PageSaves(shared, self._block_size)
        self._stats = StatsTeller(shared.metrics, of_requests=vllm_config.parallel_config.rank == 0)

    @property
    def metrics(self) -> Metrics:
        return self._shared.metrics

    @property
    def hooks(self) -> HookTimes:
        return self.metrics.hooks

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn vLLM's page tensors, and prove on them that their layout is read right.

        One that is not known, not what it looks like, or at odds with ``chunk_size`` leaves the cache off, in words.
        """
        try:
            connector = self._connect(kv_caches)
            self._lost.learn_pages(connector, list(kv_caches))
            self._engine.set_gpu_connector(connector)
            if self._shared.config.enable_blending:
                self._find_blender(connector, list(kv_caches))
        except ValueError as error:
            self.metrics.failure("unknown_layout")
            logger.error("The KV cache stays off: %s", error)
        except Exception as error:
            report_failure(self.metrics, "register_kv_caches", error)

    def _find_blender(self, connector: PagedConnector, layer_names: list[str]) -> None:
        try:
            self._blend_defaults = BlendDefaults(self._shared.config)
            usual = self._blend_defaults.for_request({})
        except ValueError as error:
            self.metrics.blend_fallback("configuration")
            logger.error("CacheBlend stays off: %s", error)
            return
        try:
            blender = Blender.find(self._vllm_config, connector, layer_names)
            blender.warm_up(usual.policy, usual.corrector, cuda_graphs=self._shared.config.blend_cuda_graphs)
            self._shared.blender = blender
            logger.info("CacheBlend is on: policy %s", self._shared.config.blend_policy)
        except UnsupportedModelError as error:
            self.metrics.blend_fallback("unsupported_model")
            logger.warning("CacheBlend stays off: %s", error)
        except Exception as error:
            report_failure(self.metrics, "find_blender", error)

    def _connect(self, kv_caches: dict[str, torch.Tensor]) -> PagedConnector:
        names, tensors = list(kv_caches), list(kv_caches.values())
        self._layerwise.set_layers(names)
        self._device = tensors[0].device
        writer = AttentionWriter(self._vllm_config, names)
        _, _, _, heads, dim = self._engine.metadata.kv_shape
        layout = detect_layout(
            kv_caches,
            PageHints(
                block_size=self._block_size,
                num_kv_heads=heads,
                head_dim=dim,
                backend=writer.backend,
                engine=f"vLLM {vllm.__version__}",
            ),
        )
        if writer.available:
            layout = verify_layout(layout, tensors, writer, dtype=self._vllm_config.model_config.dtype)
        else:
            logger.warning("The layout %s of backend %s could not be checked by writing", layout.name, writer.backend)
        config = self._shared.config
        connector = make_connector(
            layout,
            tensors,
            config.chunk_size,
            token_major=config.chunk_layout == "token_major",
            background_saves=True,
        )
        connector.warm_up()
        logger.info("KV pages: %s, %d layers, moved by %s", layout.name, len(names), type(connector).__name__)
        return connector

    @never_raise(lambda: None)
    def bind_connector_metadata(self, meta: LMCacheConnectorMetadata) -> None:
        """Start a step, once. Before vLLM 0.32 its first call is :meth:`start_load_kv`, which comes here."""
        if meta is self._meta:
            return
        self._meta = meta
        if meta.preempted:
            # Their blocks may belong to someone else in this very step.
            self._shared.saves.wait(meta.preempted)
        for req_id in meta.delayed_frees:
            self._shared.saves.free_when_done(req_id)

    @never_raise(lambda: None)
    def start_load_kv(self, meta: LMCacheConnectorMetadata, context: ForwardContext | None = None) -> None:
        """``context``: of this step's forward, where its layers may be asked for one by one."""
        self.bind_connector_metadata(meta)
        if not self._early.has_begun(meta, self._device):
            self._start(meta, context)

    @never_raise(lambda: None)
    def begin_early(self, meta: LMCacheConnectorMetadata) -> None:
        """A step is planned: start it, if that can be, so that :meth:`start_load_kv` has nothing left to do."""
        if self._shared.config.use_layerwise and not meta.blends:
            return  # its forward asks for one layer after the other
        if self._early.begins(meta, self._device):
            with torch.inference_mode():
                self.bind_connector_metadata(meta)
                self._start(meta, None)

    def _start(self, meta: LMCacheConnectorMetadata, context: ForwardContext | None) -> None:
        self._lost.begin_step()
        for load in meta.asynchronous_loads:
            self._shared.loads.submit(load.req_id, partial(self._load, load, asynchronous=True))
        # Beside a GPU the host only keeps count of rows: to wake up other threads takes longer than to do it.
        with one_thread() if self._device.type == "cuda" else nullcontext():
            if meta.loads:
                # A blend stands on the whole prefix, which may be what another request loads.
                layerwise = self._shared.config.use_layerwise and not meta.blends and calls_layer_hooks(context)
                self._lost.compute(meta.loads, [not self._load(load, layerwise=layerwise) for load in meta.loads])
            if meta.blends:
                with self.metrics.hooks.apart("blend"):
                    self._blend(meta.blends)

    @property
    def loads_by_layer(self) -> bool:
        """Whether layers of this step are still to come."""
        return self._layerwise.under_way

    @engine_hook
    @never_raise(lambda: None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        self._layerwise.advance_to(layer_name)

    @never_raise(lambda: None)
    def wait_for_save(self) -> None:
        """Queue this step's saves. They read the pages while the next step runs."""
        meta, self._meta = self._meta, None
        self._end_loads(meta)
        if meta is None or not (meta.saves or meta.segment_saves):
            return
        written = self._queued_work()
        for save in meta.saves:
            # Behind a failed load this forward may have computed on pages that were not filled.
            if not self._lost.spoils(save.req_id, save.block_ids):
                self._shared.saves.submit(save.req_id, save.keys, partial(self._page_saves.save, save, written))
        for segments in meta.segment_saves:
            if not self._lost.spoils(segments.req_id, segments.block_ids):
                self._shared.saves.submit(
                    segments.req_id, (), partial(self._page_saves.save_segments, segments, written)
                )

    def get_finished(self) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks may be freed now, and those whose asynchronous load has ended."""
        return self._shared.saves.take_freed() or None, self._shared.loads.take_finished() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that were promised and could not be filled: vLLM computes them."""
        return self._lost.take_blocks()

    @never_raise(list)
    def get_kv_events(self) -> Iterable[CacheStoreEvent]:
        return self._engine.take_events()

    @never_raise(lambda: None)
    def stats_since_last(self) -> LMCacheStats | None:
        return self._stats.since_last()

    def _end_loads(self, meta: LMCacheConnectorMetadata | None) -> None:
        try:
            self._layerwise.finish()
        except Exception as error:  # the other ranks wait for us
            report_failure(self.metrics, "end_loads", error)
        if meta is not None:
            self._lost.agree([*meta.loads, *(self._as_load(op, None) for op in meta.blends)])

    @Range("load")
    def _load(self, op: LoadOp, *, layerwise: bool = False, asynchronous: bool = False) -> bool:
        """Fill the pages of ``op``: queue it on the device, or, ``asynchronous``, see it done. Whether that went well;
        one that is ``asynchronous`` is given up if not."""
        lease = self._shared.handed_over.pop(op.lease, None)
        try:
            if lease is None:
                raise RuntimeError(f"nothing was handed over for request {op.req_id}")
            # An asynchronous load has blocks for just what was promised: one token less than a full hit.
            end = min(op.end, len(op.block_ids) * self._block_size)
            tokens = op.token_ids[:end]
            slots = slot_mapping(op.block_ids, end, self._block_size, first=op.start)
            wanted = torch.arange(end) >= op.start if op.start else None
            if layerwise:
                steps = self._engine.retrieve_layer(tokens, wanted, slot_mapping=slots, lease=lease)
                self._layerwise.start(op, lease, steps)
                return True
            found = int(self._engine.retrieve(tokens, wanted, slot_mapping=slots, lease=lease).sum())
            if found < end - op.start:
                raise RuntimeError(f"{found} of {end - op.start} promised tokens could be loaded")
            if asynchronous:
                self._queued_work()()
            self._release(lease)
        except Exception as error:
            if lease is not None:
                self._release(lease)
            if asynchronous:  # beside a forward nothing can be computed; vLLM has not begun with the request
                self._lost.give_up(op, error)
            else:
                report_failure(self.metrics, "load", error)
            return False
        return True

    def _release(self, lease: Releasable) -> None:
        """Give ``lease`` back when what is queued on the device now is done: until then it may be read."""
        if self._device.type == "cuda":
            self._shared.releases.after(self._queued_work(), lease)
        else:
            lease.release()

    @Range("blend")
    def _blend(self, ops: list[BlendOp]) -> None:
        """Fill the pages of ``ops``; one that fails is computed whole."""
        prepared = self._prepared(ops)
        try:
            requests = [
                PagedRequest(op.req_id, prepared[op.req_id], self._slots_of(op, prepared[op.req_id]))
                for op in self._possible(ops, prepared)
            ]
            blender = self._shared.blender
            assert blender is not None
            done = blender.run(requests) if requests else {}
        except Exception as error:
            done = {op.req_id: error for op in ops}
        finally:
            for blend in prepared.values():
                self._release(blend.lease)
        for op in ops:
            outcome = done.get(op.req_id)
            if isinstance(outcome, BlendReport):
                self._count_blend(op.req_id, prepared[op.req_id], outcome)
                continue
            self.metrics.blend_fallback("error" if outcome is not None else "prefix_load")
            lost = outcome or RuntimeError("the prefix in front of a blend could not be loaded")
            report_failure(self.metrics, "load", lost)
        whole = [self._as_load(op, prepared.get(op.req_id)) for op in ops]
        self._lost.compute(whole, [not isinstance(done.get(op.req_id), BlendReport) for op in ops])

    def _prepared(self, ops: list[BlendOp]) -> dict[str, PreparedBlend]:
        """By request. One that is missing has lost what it was promised."""
        prepared: dict[str, PreparedBlend] = {}
        for op in ops:
            try:
                prepared[op.req_id] = take_blend(self._shared, self._blend_defaults, op)
            except Exception as error:  # noqa: PERF203 - each request's fault is its own
                report_failure(self.metrics, "prepare_blend", error)
        return prepared

    def _possible(self, ops: list[BlendOp], prepared: dict[str, PreparedBlend]) -> list[BlendOp]:
        """Those whose passages are held and whose prefix is in place, in every rank: their forwards are one."""
        # Of a prefix that another request has loaded, too.
        lost = [op.req_id not in prepared or self._lost.is_given_up(op.req_id, op.block_ids) for op in ops]
        if self._agreement is not None:
            lost = self._agreement.any_rank(lost)
        return [op for op, is_lost in zip(ops, lost, strict=True) if not is_lost]

    def _as_load(self, op: BlendOp, prepared: PreparedBlend | None) -> LoadOp:
        """What ``op`` was to fill, as far as its tokens are known; the last one is vLLM's own."""
        known = prepared or op.planned
        if known is None:
            return LoadOp(op.req_id, [], op.exact_tokens, len(op.block_ids) * self._block_size, op.block_ids)
        return LoadOp(op.req_id, known.token_ids, op.exact_tokens, len(known.token_ids) - 1, op.block_ids)

    def _slots_of(self, op: BlendOp, prepared: PreparedBlend) -> torch.Tensor:
        return slot_mapping(op.block_ids, len(prepared.token_ids), self._block_size)

    def _count_blend(self, req_id: str, prepared: PreparedBlend, report: BlendReport) -> None:
        try:
            told = report_of(prepared, report)
            self._shared.blend_reports[req_id] = told
            if report.fallback is None:
                self.metrics.blended(prepared.reused_tokens, told["recomputed_tokens"], report.seconds)
            else:
                self.metrics.blend_fallback("passage_load")
        except Exception as error:  # the blend itself is done
            report_failure(self.metrics, "blend_report", error)

    def _queued_work(self) -> Callable[[], None]:
        """A call that returns once everything queued on the device so far is done; on the CPU it is."""
        if self._device.type != "cuda":
            return _nothing_queued
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


def _nothing_queued() -> None:
    pass
