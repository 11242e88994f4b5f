"""q, k and v are copied as they are, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.needs_triton import DEVICE, DTYPES, require

require()

from lmcache.kernels.copy_heads import copy_heads  # noqa: E402 - needs Triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dims"), [((4, 2, 2), (64, 64, 64)), ((9, 3, 3), (64, 64, 64)), ((20, 4, 4), (80, 80, 48))]
)
@pytest.mark.parametrize("count", [1, 13])
def test_parts_of_one_product(count: int, heads: tuple[int, ...], dims: tuple[int, ...], dtype: torch.dtype) -> None:
    widths = [number * dim for number, dim in zip(heads, dims, strict=True)]
    product = torch.randn(count, sum(widths), device=DEVICE).to(dtype)
    parts = [x.view(count, -1, dim) for x, dim in zip(product.split(widths, 1), dims, strict=True)]
    rooms = [torch.full((count + 1, *x.shape[1:]), torch.nan, dtype=dtype, device=DEVICE) for x in parts]
    assert copy_heads(parts, [room[:count] for room in rooms])
    for part, room in zip(parts, rooms, strict=True):
        assert torch.equal(room[:count], part)
        assert bool(room[count:].isnan().all())


def test_what_lies_otherwise_is_left_to_others() -> None:
    parts = list(torch.randn(3, 5, 8, 2, device=DEVICE).transpose(2, 3))
    rooms = [torch.zeros(5, 2, 8, device=DEVICE) for _ in parts]
    assert not copy_heads(parts, rooms)
    assert not any(bool(room.any()) for room in rooms)
