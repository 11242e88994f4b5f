"""The part of sparse attention that needs no mask, cut so that an engine's own attention can compute it.

Queries that follow each other closely all see the keys before the first of them. Taken in runs, that is attention of
many short sequences over one paged prompt without a mask, which engines have tuned kernels for (FlashAttention 3:
about 500 TFLOP/s on an H100, 1.4 to 1.7 times ours). What is left is a band of keys for each run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

RUN_TOKENS = 128
# Below that a band is most of the work, or all of it is done before the host has started two kernels.
_MIN_QUERIES = 2 * RUN_TOKENS
_MIN_KEYS = 4096
_MIN_PAIRS = 2**22


@dataclass(frozen=True)
class DenseRuns:
    """int32, on the device: ``starts`` ``[R + 1]``, where each run of queries begins; ``keys`` ``[R]``, how many keys
    all of its queries see; ``blocks`` ``[R, B]``, the pages of the prompt, for every run the same. ``most_keys`` is the
    largest of ``keys``."""

    starts: torch.Tensor
    keys: torch.Tensor
    blocks: torch.Tensor
    most_keys: int


class DenseAttention(Protocol):
    """An engine's own attention without a mask."""

    def __call__(
        self, q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, runs: DenseRuns, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``q`` ``[n, query_heads, dim]``, pages ``[blocks, block_size, kv_heads, dim]``.

        Returns:
            ``[n, query_heads, dim]``, dense, and the logarithms of the softmax sums, float32 ``[query_heads, n]``.
        """


def dense_runs(positions: torch.Tensor, slots: torch.Tensor, block_size: int, device: torch.device) -> DenseRuns | None:
    """The runs of queries at ``positions`` (int64 ``[n]``, ascending) of a prompt with ``slots`` (int64 ``[N]``); both
    on the CPU. None where that does not pay, or where the prompt does not lie in whole pages, in order."""
    if len(positions) < _MIN_QUERIES or len(slots) < _MIN_KEYS or len(positions) * len(slots) < _MIN_PAIRS:
        return None
    blocks = slots[::block_size] // block_size
    token = torch.arange(len(slots))
    if not torch.equal(slots, blocks[token // block_size] * block_size + token % block_size):
        return None
    starts = torch.arange(0, len(positions), RUN_TOKENS)
    keys = positions[starts] + 1
    ends = torch.cat([starts, torch.tensor([len(positions)])])
    table = blocks.to(torch.int32).to(device)[None].expand(len(starts), -1).contiguous()
    return DenseRuns(ends.to(torch.int32).to(device), keys.to(torch.int32).to(device), table, int(keys[-1]))
