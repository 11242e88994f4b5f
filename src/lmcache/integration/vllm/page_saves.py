"""Saves: from vLLM's pages into the cache, and to the index of passages."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmcache.integration.guard import report_failure
from lmcache.integration.vllm.connector_metadata import SaveOp, SegmentRun, SegmentSaveOp
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.keys import PrefixKey, token_array
from lmcache.memory.int_tensor import int_tensor
from lmcache.observability.ranges import Range
from lmcache.prompt import cut
from lmcache.segmentation.known_passages import KnownChunk


class PageSaves:
    """What :class:`lmcache.integration.vllm.pending_saves.PendingSaves` runs."""

    def __init__(self, shared: SharedEngine, block_size: int) -> None:
        self._shared = shared
        self._engine = shared.engine
        self._block_size = block_size

    @Range("save")
    def save(self, op: SaveOp, written: Callable[[], None]) -> None:
        """Once ``written`` returns. Never raises."""
        try:
            written()
            slots = slot_mapping(op.block_ids, len(op.token_ids), self._block_size)
            new = torch.arange(len(op.token_ids)) >= op.start
            keys = self._of_this_shard(op)
            self._engine.store(
                op.token_ids, mask=new, slot_mapping=slots, keys=keys, lora=op.lora, cache_salt=op.cache_salt
            )
            size, num_tokens = self._shared.config.chunk_size, len(op.token_ids)
            chunks = cut(num_tokens, keys, size)[op.start // size :]
            self._remember(SegmentRun(chunks, keys[op.start // size - 1] if op.start else None), op)
        except Exception as error:
            report_failure(self._shared.metrics, "save", error)

    @Range("save passages")
    def save_segments(self, op: SegmentSaveOp, written: Callable[[], None]) -> None:
        """Once ``written`` returns. Never raises."""
        try:
            written()
            slots = slot_mapping(op.block_ids, len(op.token_ids), self._block_size)
            runs = self._runs_of_this_shard(op)
            self._engine.store_chunks([chunk for run in runs for chunk in run.chunks], slots)
            for run in runs:
                self._remember(run, op)
        except Exception as error:
            report_failure(self._shared.metrics, "save_segments", error)

    def _of_this_shard(self, op: SaveOp) -> list[PrefixKey]:
        """The scheduler role names chunks as the first rank does."""
        namespace = self._engine.namespace(lora=op.lora, cache_salt=op.cache_salt, paged=True)
        if not op.keys or op.keys[0].namespace_id == namespace.id:
            return op.keys
        return [key.of_shard(namespace) for key in op.keys]

    def _runs_of_this_shard(self, op: SegmentSaveOp) -> list[SegmentRun]:
        namespace = self._engine.namespace(lora=op.lora, cache_salt=op.cache_salt, paged=True)
        return [
            SegmentRun(
                [chunk._replace(key=chunk.key.of_shard(namespace)) for chunk in run.chunks],
                None if run.before is None else run.before.of_shard(namespace),
            )
            for run in op.runs
        ]

    def _remember(self, run: SegmentRun, op: SaveOp | SegmentSaveOp) -> None:
        """Let the tokens of chunks be found anywhere."""
        known = self._shared.manager.passages
        if known is None or self._shared.blender is None or not run.chunks:
            return
        first = run.chunks[0].start
        tokens = token_array(op.token_ids[first : run.chunks[-1].end])
        known.add_prompt(
            [KnownChunk(key, tokens[start - first : end - first], start) for key, start, end in run.chunks],
            op.seams,
            before=run.before,
        )


def slot_mapping(block_ids: list[int], num_tokens: int, block_size: int, *, first: int = 0) -> torch.Tensor:
    """Slot of each of ``num_tokens`` tokens, int64 ``[T]``; −1 before ``first``."""
    blocks = int_tensor(block_ids[: -(-num_tokens // block_size)])
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:num_tokens]
    slots[:first] = -1
    return slots
