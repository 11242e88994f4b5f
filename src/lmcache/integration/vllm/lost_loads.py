"""What was promised to vLLM and did not come: it is computed here, before vLLM's forward stands on it.

vLLM has a way of its own to compute it (``get_block_ids_with_load_errors``), but only once its forward is through. If
its scheduler is a step ahead by then, or its model runner is the second one, as on a GPU, the answer is wrong: it keeps
tokens of the spoilt forward (vLLM issue 49250). So that is left for what cannot be computed here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lmcache.integration.guard import report_failure
from lmcache.integration.vllm.blend.blender import Blender
from lmcache.integration.vllm.connector_metadata import LoadOp
from lmcache.integration.vllm.page_saves import slot_mapping
from lmcache.integration.vllm.parallel.agreement import TensorParallelAgreement
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.paging.paged_connector import PagedConnector

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class LostLoads:
    """The worker role's account of them. Ranks go by each other's faults."""

    def __init__(
        self, shared: SharedEngine, vllm_config: VllmConfig, agreement: TensorParallelAgreement | None
    ) -> None:
        self._shared = shared
        self._vllm_config = vllm_config
        self._block_size: int = vllm_config.cache_config.block_size
        self._agreement = agreement
        self._pages: tuple[PagedConnector, Sequence[str]] | None = None
        self._blender: Blender | None = None
        self._given_up: set[str] = set()
        self._lock = threading.Lock()
        self._failed_blocks: set[int] = set()

    def learn_pages(self, connector: PagedConnector, layer_names: Sequence[str]) -> None:
        """``layer_names``: of the layers whose pages ``connector`` moves, in its order."""
        self._pages = connector, layer_names

    def begin_step(self) -> None:
        self._given_up.clear()

    def compute(self, ops: Sequence[LoadOp], lost: Sequence[bool]) -> None:
        """Fill the pages of those ``ops`` that are ``lost`` in any rank; what lies before them is in place. They count
        as failed all the same: nothing was reused."""
        if self._agreement is not None:  # ranks compute together
            lost = self._agreement.any_rank(lost)
        for op, is_lost in zip(ops, lost, strict=True):
            if not is_lost:
                continue
            self._shared.failed_loads.add(op.req_id)
            self._shared.blend_reports.pop(op.req_id, None)
            try:
                self._compute(op)
            except Exception as error:
                self._give_up(op)
                report_failure(self._shared.metrics, "compute_lost", error)

    def give_up(self, op: LoadOp, error: Exception) -> None:
        """Leave the blocks of ``op`` to vLLM."""
        self._give_up(op)
        report_failure(self._shared.metrics, "load", error)

    def is_given_up(self, req_id: str, block_ids: Iterable[int]) -> bool:
        """Whether a request, with these blocks, stands on some that were not filled."""
        return req_id in self._given_up or self._any_failed(block_ids)

    def spoils(self, req_id: str, block_ids: Iterable[int]) -> bool:
        """Whether this step's forward must not be kept for a request with these blocks."""
        return req_id in self._shared.failed_loads or self._any_failed(block_ids)

    def agree(self, ops: Sequence[LoadOp]) -> None:
        """After the forward: what another rank has given up is lost here too, for each layer has added up what all of
        them computed."""
        if self._agreement is None or not ops:
            return
        given_up = [op.req_id in self._given_up for op in ops]
        for op, lost in zip(ops, self._agreement.any_rank(given_up), strict=True):
            if lost and op.req_id not in self._given_up:
                self._shared.blend_reports.pop(op.req_id, None)
                self._give_up(op)

    def take_blocks(self) -> set[int]:
        """Those that vLLM must compute, since this was last asked."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def _compute(self, op: LoadOp) -> None:
        end = min(op.end, len(op.block_ids) * self._block_size)
        if len(op.token_ids) < end:
            raise LookupError("nothing is known of its tokens any more")
        if not op.tokens_say_all:
            raise LookupError("its tokens are not all that its KV hangs on")
        if self._any_failed(op.block_ids[: -(-op.start // self._block_size)]):
            raise RuntimeError("what lies before it was not filled either")
        if op.start < end:
            slots = slot_mapping(op.block_ids, end, self._block_size)
            self._find_blender().compute(op.token_ids[:end], slots, op.start)

    def _find_blender(self) -> Blender:
        """A model that CacheBlend knows can be run, whether CacheBlend is on or not."""
        if self._shared.blender is not None:
            return self._shared.blender
        if self._blender is None:
            assert self._pages is not None
            self._blender = Blender.find(self._vllm_config, *self._pages)
        return self._blender

    def _any_failed(self, block_ids: Iterable[int]) -> bool:
        with self._lock:
            return not self._failed_blocks.isdisjoint(block_ids)

    def _give_up(self, op: LoadOp) -> None:
        with self._lock:
            self._failed_blocks.update(op.block_ids[op.start // self._block_size : -(-op.end // self._block_size)])
        self._shared.failed_loads.add(op.req_id)
        self._given_up.add(op.req_id)
