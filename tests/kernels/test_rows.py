"""Rows are written, turned, added to, read and compared, and no byte beside them changes."""

from __future__ import annotations

import pytest
import torch

from lmcache.blend.rope import FusedRope, RopeFrequencies
from tests.kernels.needs_triton import DEVICE, DTYPES, require

require()

from lmcache.kernels.kv_read import deviation, read, read_among  # noqa: E402 - needs Triton
from lmcache.kernels.kv_rows import KVRows  # noqa: E402
from lmcache.kernels.kv_write import Turns, place, write  # noqa: E402

BLOCK, TOKENS, MOVED = 16, 100, 60


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "rotary", "neox"), [(2, 64, 64, True), (3, 48, 32, True), (2, 40, 20, False)])
def test_rows_in_pages(heads: int, dim: int, rotary: int, neox: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pages = torch.full((9, 2, BLOCK, heads, dim), torch.nan, dtype=dtype, device=DEVICE)
    slots = torch.randperm(9 * BLOCK, device=DEVICE)[:TOKENS]
    offsets = slots // BLOCK * pages.stride(0) + slots % BLOCK * pages.stride(2)
    kv = KVRows(pages[:, 0], pages[:, 1], offsets, heads, dim, dim, pages.stride(3), pages.stride(3), 4)
    staged = torch.randn(2 * TOKENS, heads * dim, device=DEVICE).to(dtype)
    k_from, v_from = (torch.randperm(2 * TOKENS, device=DEVICE)[:MOVED].int() for _ in range(2))
    rows = torch.randperm(TOKENS, device=DEVICE)[:MOVED].int()
    frequencies = RopeFrequencies(1e4 ** -(torch.arange(rotary // 2) / (rotary // 2)))
    rope = FusedRope(frequencies, head_size=dim, is_neox_style=neox)
    distances = torch.randint(-50, 50, (MOVED,))
    angles = (distances[:, None].double() * frequencies.inv_freq).to(DEVICE)
    every = torch.arange(MOVED, device=DEVICE).int()

    place(staged, k_from, v_from, rows, kv, Turns(angles.cos().float(), angles.sin().float(), every, neox))
    keys, values = read(kv, rows)
    turned = rope.fused_encode(
        torch.zeros(MOVED, dtype=torch.int64), distances, staged[k_from].view(MOVED, heads, dim).cpu().clone()
    )
    torch.testing.assert_close(keys.cpu(), turned, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
    assert torch.equal(values, staged[v_from].view(MOVED, heads, dim))
    assert int(pages.isnan().sum()) == (9 * BLOCK - MOVED) * 2 * heads * dim, "nothing else is written"

    # Views with gaps, as engines hand them over
    fresh = torch.randn(MOVED, heads + 1, 2 * dim, device=DEVICE).to(dtype)[:, 1:, :dim]
    measured = deviation(fresh, fresh, rows, kv)
    for change, held in zip(measured, (keys, values), strict=True):
        torch.testing.assert_close(change, (fresh.float() - held.float()).square().flatten(1).sum(1))
    third = torch.arange(MOVED, device=DEVICE) % 3 == 0
    among = read_among(
        kv, rows, fresh, 2 * fresh, torch.where(third, torch.arange(MOVED, device=DEVICE) // 3, -1).int()
    )
    for plane, held, computed in zip(among, (keys, values), (fresh, 2 * fresh), strict=True):
        assert torch.equal(plane[~third], held[~third])
        assert torch.equal(plane[third], computed[: int(third.sum())])

    left_out = torch.where(third, -1, rows).int()
    write(fresh, fresh, left_out, kv)
    for plane, before in zip(read(kv, rows), (keys, values), strict=True):
        assert torch.equal(plane[::3], before[::3])
        assert torch.equal(plane[1::3], fresh[1::3])
    write(fresh, fresh, rows, kv)
    write(fresh.float(), fresh.float(), rows, kv, add=True)
    assert all(torch.equal(plane, 2 * fresh) for plane in read(kv, rows))
    assert all(int(plane.abs().sum()) == 0 for plane in read(kv, torch.full((5,), -1, device=DEVICE).int()))
