"""A passage of which some tokens were recomputed: the sample by which a corrector moves the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from lmcache.blend.correctors.interface import LayerCorrection, Memo

# Tokens that are shifted at a time. It bounds what is held beside the KV; and on a CPU, adding float32 to a 16-bit
# tensor copies the whole of it first: 10,000 tokens of 8 heads of 128 take ten times as long in one piece.
_BLOCK = 1024


class PieceLimits(NamedTuple):
    """A piece of a passage has at most so many ``tokens``, which it is cut into equal pieces for, and ``fresh`` ones
    among them, which it is halved for: they cost their number cubed."""

    tokens: int
    fresh: int


class SampledTensor(NamedTuple):
    """K or V of a span of ``n`` tokens: ``moved`` ``[n, kv_heads, dim]`` is a view, to be changed in place.

    ``change`` ``[m, kv_heads · dim]`` is fresh − moved of the recomputed tokens, float32 (float64 for float64 KV).
    """

    moved: torch.Tensor
    change: torch.Tensor

    def add(self, tokens: slice, by: torch.Tensor) -> None:
        """Shift some tokens ``by`` ``[1 or their number, kv_heads · dim]``: summed up in float32, rounded once."""
        moved = self.moved[tokens]
        moved += by.view(-1, *moved.shape[1:])


class SampledSpan(NamedTuple):
    """``fresh`` (int64 ``[m]``, 0 … n−1, ascending, m ≥ 1) are the tokens of the span that were recomputed. ``memo`` is
    the span's own, for all layers."""

    fresh: torch.Tensor
    keys: SampledTensor
    values: SampledTensor
    memo: Memo

    def blocks(self) -> Iterator[slice]:
        """The tokens of the span, in pieces."""
        num_tokens = len(self.keys.moved)
        for start in range(0, num_tokens, _BLOCK):
            yield slice(start, min(start + _BLOCK, num_tokens))

    def distances(self, tokens: slice) -> torch.Tensor:
        """From some tokens to the recomputed ones, ``[b, m]`` in the type of the changes."""
        at = torch.arange(tokens.start, tokens.stop, device=self.fresh.device)
        return (at[:, None] - self.fresh).to(self.keys.change.dtype)


def sampled_spans(layer: LayerCorrection, limits: PieceLimits | None = None) -> Iterator[SampledSpan]:
    """The spans with a recomputed token. Each stands alone, so that a prompt is corrected in a batch as it is alone, to
    the bit.

    Args:
        limits: a span beyond them is cut into pieces, each of which counts as a span. None: none is.
    """
    pieces: list[_Piece] | None = layer.memo.get((layer.spans, limits))
    if pieces is None:
        pieces = layer.memo[layer.spans, limits] = list(_pieces(layer, limits))
    for start, end, rows, fresh, memo in pieces:
        yield SampledSpan(
            fresh,
            _sampled(layer.keys[start:end], fresh, layer.fresh_keys[rows]),
            _sampled(layer.values[start:end], fresh, layer.fresh_values[rows]),
            memo,
        )


class _Piece(NamedTuple):
    """Rows ``[start, end)`` of the batch, of which ``rows`` of the fresh ones were recomputed."""

    start: int
    end: int
    rows: slice
    fresh: torch.Tensor
    memo: Memo


def _pieces(layer: LayerCorrection, limits: PieceLimits | None) -> Iterator[_Piece]:
    for start, end, first, last in cut_spans(layer.spans, layer.rows.cpu(), limits):
        fresh = layer.rows[first:last].to(layer.keys.device) - start
        yield _Piece(start, end, slice(first, last), fresh, {})


def cut_spans(
    spans: Sequence[tuple[int, int]], rows: torch.Tensor, limits: PieceLimits | None
) -> Iterator[tuple[int, int, int, int]]:
    """The pieces with a recomputed token: the half-open range of their rows, and that of the ones in ``rows`` (int64,
    on the CPU, ascending)."""
    ascending = rows.numpy()
    for start, end in spans:
        pieces = 1 if limits is None else -(-(end - start) // limits.tokens)
        edges = [start + (end - start) * piece // pieces for piece in range(pieces + 1)]
        waiting = list(pairwise(edges))
        while waiting:
            begin, stop = waiting.pop(0)
            first, last = np.searchsorted(ascending, (begin, stop)).tolist()
            if limits is not None and last - first > limits.fresh:
                middle = (begin + stop) // 2
                waiting[:0] = [(begin, middle), (middle, stop)]
            elif first < last:
                yield begin, stop, first, last


def _sampled(moved: torch.Tensor, fresh: torch.Tensor, computed: torch.Tensor) -> SampledTensor:
    dtype = torch.promote_types(moved.dtype, torch.float32)
    return SampledTensor(moved, (computed.to(dtype) - moved.index_select(0, fresh).to(dtype)).flatten(1))
