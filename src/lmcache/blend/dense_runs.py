"""The part of sparse attention that needs no mask, cut so that an engine's own attention can compute it.

Queries that follow each other closely all see the keys before the first of them. Taken in runs, that is attention of
many short sequences over one paged prompt without a mask, which engines have tuned kernels for (FlashAttention 3:
about 500 TFLOP/s on an H100, 1.4 to 1.7 times ours). What is left is a band of keys for each run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from lmcache.memory.to_device import ints_to_device

_TILE = 128
_FEWEST_RUN_TOKENS = 32
# Below that a band is most of the work, or all of it is done before the host has started two kernels.
_MIN_QUERIES = 256
_MIN_KEYS = 4096
_MIN_PAIRS = 2**22


def run_tokens(group: int) -> int:
    """Queries of a run, where ``group`` query heads share a KV head.

    Such heads stand in a tile together, here as in FlashAttention 3, so a run need be no longer than what fills whole
    tiles; and the shorter it is, the shorter is its band.
    """
    return max(_FEWEST_RUN_TOKENS, _TILE // math.gcd(_TILE, group))


@dataclass(frozen=True)
class DenseRuns:
    """Runs of ``tokens`` queries, the last one of fewer, over the pages ``blocks`` (int32 ``[R, B]``, for every run the
    same). All on the device.

    ``keys`` (int32 ``[R]``): how many keys all queries of a run see; ``most_keys`` is the largest of them.

    An engine begins with the first sequence that it is given, and the last one to end should be a short one: ``order``
    (int32 ``[n]``) are the queries with the last run first. ``starts`` (int32 ``[R + 1]``) says where each run begins
    in that order, ``keys_in_order`` are the ``keys`` of it.
    """

    tokens: int
    keys: torch.Tensor
    blocks: torch.Tensor
    most_keys: int
    order: torch.Tensor
    starts: torch.Tensor
    keys_in_order: torch.Tensor


class DenseAttention(Protocol):
    """An engine's own attention without a mask."""

    def __call__(
        self, q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, runs: DenseRuns, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``q`` ``[n, query_heads, dim]``, pages ``[blocks, block_size, kv_heads, dim]``.

        Returns:
            ``[n, query_heads, dim]``, dense, and the logarithms of the softmax sums, float32 ``[query_heads, n]``; both
            in the order of ``runs``.
        """


def blocks_in_order(slots: torch.Tensor, block_size: int) -> torch.Tensor | None:
    """int32 ``[B]``: the pages of a prompt with ``slots`` (int64 ``[N]``); None where it does not lie in whole pages,
    in order. Both on the CPU."""
    at = slots.numpy()
    blocks = at[::block_size] // block_size
    in_order = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
    return torch.from_numpy(blocks.astype(np.int32)) if np.array_equal(at, in_order[: len(at)]) else None


def pays(num_queries: int, num_keys: int) -> bool:
    return num_queries >= _MIN_QUERIES and num_keys >= _MIN_KEYS and num_queries * num_keys >= _MIN_PAIRS


def dense_runs(positions: torch.Tensor, blocks: torch.Tensor, device: torch.device, tokens: int) -> DenseRuns:
    """The runs of queries at ``positions`` (int64 ``[n]``, ascending, on the CPU) of a prompt that lies in the pages
    ``blocks`` (int32, on the device), of ``tokens`` each."""
    count = len(positions)
    begins = np.arange(0, count, tokens)
    ends = np.minimum(begins + tokens, count)
    keys = positions.numpy()[begins] + 1
    order = np.concatenate([np.arange(begin, end) for begin, end in zip(begins[::-1], ends[::-1], strict=True)])
    starts = np.concatenate([[0], np.cumsum((ends - begins)[::-1])])
    sent = ints_to_device([keys, order, starts, keys[::-1]], device)
    return DenseRuns(
        tokens=tokens,
        keys=sent[0],
        blocks=blocks[None].expand(len(keys), -1).contiguous(),
        most_keys=int(keys[-1]),
        order=sent[1],
        starts=sent[2],
        keys_in_order=sent[3],
    )
