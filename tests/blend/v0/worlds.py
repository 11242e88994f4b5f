"""Batches with numbers small enough that all arithmetic is exact, and a host that runs them through an executor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmcache.blend.executor import CacheBlendImpl
from lmcache.blend.interfaces import BlendOutput

LAYERS, HEADS, QUERY_HEADS, DIM = 4, 2, 3, 4

SHAPES = {"flat": 0, "heads": 0, "heads first": 1}
"""How tensors may look, and their token_dim: ``[N, H · D]``, ``[N, H, D]``, ``[H, N, D]``."""


def shaped(token_major: torch.Tensor, shape: str) -> torch.Tensor:
    """``[N, H, D]`` in one of :data:`SHAPES`."""
    if shape == "flat":
        return token_major.flatten(1)
    return token_major.transpose(0, 1) if shape == "heads first" else token_major


def token_major(tensor: torch.Tensor, shape: str) -> torch.Tensor:
    """The inverse of :func:`shaped`."""
    if shape == "flat":
        return tensor.unflatten(1, (-1, DIM))
    return tensor.transpose(0, 1) if shape == "heads first" else tensor


@dataclass
class Batch:
    """What is retrieved and what a host would compute, token-major: q ``[L, N, QH, D]``, k and v ``[L, N, H, D]``."""

    lengths: Sequence[int]
    valid: torch.Tensor
    original_positions: torch.Tensor
    retrieved_k: torch.Tensor
    retrieved_v: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def requests(self) -> list[range]:
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        return [range(start, start + length) for start, length in zip(starts, self.lengths, strict=True)]

    @property
    def query_start_loc(self) -> torch.Tensor:
        return torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], dtype=torch.int32)

    @property
    def positions(self) -> torch.Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths])


def make_batch(
    lengths: Sequence[int], valid: Sequence[int] | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Batch:
    """Numbers from −3 to 3: many equal scores. Retrieved KV that is not valid is NaN."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def numbers(heads: int) -> torch.Tensor:
        return torch.randint(-3, 4, (LAYERS, count, heads, DIM), generator=generator).to(dtype)

    mask = torch.ones(count, dtype=torch.int32) if valid is None else torch.tensor(valid, dtype=torch.int32)
    retrieved_k, retrieved_v = numbers(HEADS), numbers(HEADS)
    retrieved_k[:, mask == 0] = retrieved_v[:, mask == 0] = torch.nan
    original = torch.randint(0, 50, (count,), generator=generator, dtype=torch.int32) * mask
    return Batch(
        lengths, mask, original, retrieved_k, retrieved_v, numbers(QUERY_HEADS), numbers(HEADS), numbers(HEADS)
    )


def arguments(batch: Batch, layer: int, rows: torch.Tensor, shape: str = "heads") -> dict[str, Any]:
    """Those of ``blend`` for a host that has computed ``rows``."""
    return {
        "layer_id": layer,
        "retrieved_k": shaped(batch.retrieved_k[layer], shape),
        "retrieved_v": shaped(batch.retrieved_v[layer], shape),
        "valid_mask": batch.valid,
        "original_positions": batch.original_positions,
        "fresh_q": shaped(batch.q[layer, rows], shape),
        "fresh_k": shaped(batch.k[layer, rows], shape),
        "fresh_v": shaped(batch.v[layer, rows], shape),
        "positions": batch.positions[rows],
        "query_start_loc": batch.query_start_loc,
        "token_dim": SHAPES[shape],
    }


def run(executor: CacheBlendImpl, batch: Batch, shape: str = "heads", **overrides: Any) -> list[BlendOutput]:
    """All layers, as a host does: it computes the rows that the executor said last."""
    outputs: list[BlendOutput] = []
    for layer in range(LAYERS):
        rows = outputs[-1].local_indices if outputs else torch.arange(batch.num_tokens)
        outputs.append(executor.blend(**{**arguments(batch, layer, rows, shape), **overrides}))
    return outputs


def shift_forward(positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for a rotation of ``[N, H, D]``: exact, and easy to see."""
    return q + positions.view(-1, 1, 1), k + positions.view(-1, 1, 1)


def shift_back(positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q - positions.view(-1, 1, 1), k - positions.view(-1, 1, 1)
