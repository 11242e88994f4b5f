"""Finds the KV of segments that end with a separator, wherever in a prompt they stand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from lmcache.blend.interfaces import BlendRetriever, BlendRetrieverResult, BlendRetrieverTask
from lmcache.blend.request_spans import request_spans
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.observability.logging import init_logger, log_limited
from lmcache.segmentation.separator import cut_after_separator

logger = init_logger(__name__)

TOKEN_DIMS = {"vllm": 2, "huggingface": 3}
"""The dimension of a blob that counts tokens, by format: ``[L, 2, T, H, D]`` and ``[L, 2, H, T, D]``."""


class TensorEngine(Protocol):
    """All that is asked of a cache engine; :class:`~lmcache.cache_engine.LMCacheEngine` has it."""

    def retrieve(self, tokens: torch.Tensor, mask: None = ..., return_tuple: bool = ...) -> Any:
        """With ``return_tuple=False``: ``(kv, found)``, a blob of the leading tokens that are held, and an integer or
        bool mask ``[T]`` of these tokens. When there are none, ``kv`` does not matter."""


@dataclass(frozen=True)
class _Hit:
    """The KV of ``count`` tokens of the batch, from ``start`` on: a blob of that many tokens."""

    start: int
    count: int
    kv: torch.Tensor


class SPTBlendRetrieverTask(BlendRetrieverTask):
    """The KV of a batch, from one retrieval a segment, whoever started them.

    A retrieval that raises, is cancelled or answers something that makes no sense is a miss of its segment, with a
    warning.
    """

    def __init__(self, token_segments: Sequence[torch.Tensor], tasks: Sequence[Future[Any]], fmt: str) -> None:
        """Args:
        token_segments: integers ``[T]`` each; one after the other they are the batch.
        tasks: for each segment, what :meth:`TensorEngine.retrieve` answers.
        fmt: of the blobs: "vllm" is ``[L, 2, T, H, D]``, "huggingface" is ``[L, 2, H, T, D]``.

        Raises:
            ValueError: another ``fmt``, or another number of tasks than of segments.
        """
        if len(token_segments) != len(tasks):
            raise ValueError(f"{len(token_segments)} segments and {len(tasks)} tasks: must be one task a segment")
        self._lengths = [len(segment) for segment in token_segments]
        self._tasks = tasks
        self._token_dim = _token_dim(fmt)

    def result(self, layer_id: int) -> BlendRetrieverResult:
        """One layer. Waits until every retrieval has ended, since each has a part of the layer.

        Returns:
            K and V in new memory, ``[N, H, D]`` ("vllm") or ``[H, N, D]`` ("huggingface"), dtype and device of the
            blobs, or None when nothing was found at all. ``valid_mask``: int32. ``original_positions``: int32,
            counting from 0 in each segment.

        Raises:
            ValueError: there is no such layer, or the blobs have one plane instead of K and V (MLA), which this API
                cannot blend.
        """
        hits = self._hits
        if layer_id < 0 or (hits and layer_id >= len(hits[0].kv)):
            has = f"the retrieved KV has {len(hits[0].kv)} layers" if hits else "must not be negative"
            raise ValueError(f"layer_id={layer_id}: {has}")
        valid = torch.zeros(sum(self._lengths), dtype=torch.int32)
        positions = torch.zeros_like(valid)
        for hit in hits:
            valid[hit.start : hit.start + hit.count] = 1
            positions[hit.start : hit.start + hit.count] = torch.arange(hit.count)
        if not hits:
            return BlendRetrieverResult(None, None, valid, positions)
        k, v = self._layer(layer_id)
        return BlendRetrieverResult(k, v, valid, positions.to(k.device))

    def _layer(self, layer_id: int) -> torch.Tensor:
        """K and V of one layer for the whole batch, ``[2, …]``. Zeros where nothing was found: memory as it comes may
        hold NaN, or KV of somebody else."""
        token_dim = self._token_dim - 1
        shape = list(self._hits[0].kv[layer_id].shape)
        shape[token_dim] = sum(self._lengths)
        layer = self._hits[0].kv.new_zeros(shape)
        for hit in self._hits:
            layer.narrow(token_dim, hit.start, hit.count).copy_(hit.kv[layer_id])
        return layer

    @cached_property
    def _hits(self) -> list[_Hit]:
        hits: list[_Hit] = []
        start = 0
        for length, task in zip(self._lengths, self._tasks, strict=True):
            try:
                kv, found = task.result()
                count = _num_leading(found, length)
                if count:
                    self._check(kv, count, hits)
                    hits.append(_Hit(start, count, kv))
            except Exception:
                log_limited(
                    logger,
                    logging.WARNING,
                    "blend-retrieval-failed",
                    "Could not retrieve the KV of a segment of %d tokens; it counts as not found",
                    length,
                    exc_info=True,
                )
            start += length
        if hits and hits[0].kv.shape[1] != 2:
            raise ValueError(
                f"The retrieved KV {list(hits[0].kv.shape)} has {hits[0].kv.shape[1]} plane(s), expected 2, K and V: "
                "this API cannot blend the KV of multi-head latent attention (MLA)"
            )
        return hits

    def _check(self, kv: object, count: int, before: list[_Hit]) -> None:
        """Raises:
        ValueError: ``kv`` is no blob of ``count`` tokens, or differs from those of other segments.
        """
        if not isinstance(kv, torch.Tensor) or kv.dim() != 5 or kv.shape[self._token_dim] != count:
            got = list(kv.shape) if isinstance(kv, torch.Tensor) else type(kv).__name__
            raise ValueError(f"expected a blob with {count} tokens in dimension {self._token_dim}, got {got}")
        if before:
            expected = list(before[0].kv.shape)
            expected[self._token_dim] = count
            if list(kv.shape) != expected:
                raise ValueError(f"expected {expected} as for other segments, got {list(kv.shape)}")


def _token_dim(fmt: str) -> int:
    if fmt not in TOKEN_DIMS:
        raise ValueError(f"fmt={fmt!r}: must be one of {', '.join(map(repr, TOKEN_DIMS))}")
    return TOKEN_DIMS[fmt]


def _num_leading(found: torch.Tensor, length: int) -> int:
    """How many tokens ``found`` marks.

    Raises:
        ValueError: it is not ``[length]``, or they are not the leading ones.
    """
    if tuple(found.shape) != (length,):
        raise ValueError(f"expected a mask [{length}], got {list(found.shape)}")
    count = int(found.count_nonzero())
    if bool(found[count:].any()):
        raise ValueError("expected a mask of leading tokens, got one with a gap")
    return count


class SPTBlendRetriever(BlendRetriever):
    """Cuts prompts after every *special token* (a separator of one token or more), and retrieves each piece.

    With the separator ``s``, a prompt ``x x x s y y s z z`` is looked up as ``x x x s``, ``y y s`` and ``z z``. So
    passages are to be stored with the separator at their end.

    Retrievals run beside the caller's own work, one after the other in the order of the segments, on one thread that
    the retriever owns; so an engine need not be thread-safe. The thread starts with the first request and ends with
    :meth:`close`, or, when nothing refers to the retriever any more, as soon as all requests are done (the pool of the
    standard library sees to that).
    """

    def __init__(self, spt: torch.Tensor, cache_engine: TensorEngine, metadata: LMCacheEngineMetadata) -> None:
        """Args:
        spt: integers ``[m]``, ``m ≥ 1``.
        cache_engine: stays the caller's. Its KV is looked up on the tensor path.
        metadata: says the format of its blobs.

        Raises:
            ValueError: ``spt`` is empty or not a row of integers, or the format is unknown.
        """
        self._spt = spt.cpu()
        self._engine = cache_engine
        self._fmt = metadata.fmt
        # Mistakes show here, and not with the first request.
        cut_after_separator(torch.empty(0, dtype=torch.int64), self._spt)
        _token_dim(self._fmt)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lmcache-blend-retrieve")

    def new_request(self, input_tokens: torch.Tensor, query_start_loc: torch.Tensor) -> SPTBlendRetrieverTask:
        """See :meth:`BlendRetriever.new_request`. No segment reaches from one request into the next.

        Raises:
            RuntimeError: after :meth:`close`.
        """
        tokens = input_tokens.to("cpu", copy=True)  # engines use their input buffers again for the next batch
        segments = [
            segment
            for start, end in request_spans(query_start_loc, len(tokens))
            for segment in cut_after_separator(tokens[start:end], self._spt)
        ]
        tasks = [
            self._pool.submit(self._engine.retrieve, segment, mask=None, return_tuple=False) for segment in segments
        ]
        return SPTBlendRetrieverTask(segments, tasks, self._fmt)

    def close(self) -> None:
        """Wait for the retrieval that runs; those that have not begun become misses. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
