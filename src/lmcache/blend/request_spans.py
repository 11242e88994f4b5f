"""The requests of a flat batch."""

from __future__ import annotations

import itertools

import torch


def request_spans(query_start_loc: torch.Tensor, num_tokens: int) -> list[tuple[int, int]]:
    """The half-open range of tokens of each request.

    Args:
        query_start_loc: integers ``[requests + 1]``: 0, then where each request ends.
        num_tokens: of the whole batch.

    Raises:
        ValueError: these are not ranges that cover the batch, one after the other.
    """
    kind = query_start_loc.dtype
    if query_start_loc.dim() != 1 or len(query_start_loc) < 2 or kind.is_floating_point or kind == torch.bool:
        raise ValueError(
            "query_start_loc: expected integers [requests + 1] for at least one request, "
            f"got {kind} {list(query_start_loc.shape)}"
        )
    bounds: list[int] = query_start_loc.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(
            f"query_start_loc={bounds}: must rise from 0 to the number of tokens of the batch, which is {num_tokens}"
        )
    return list(itertools.pairwise(bounds))
