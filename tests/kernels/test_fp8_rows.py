"""Rows of fp8 pages: moved, turned, written, added to, read and compared, as torch does it on the real numbers."""

from __future__ import annotations

import pytest
import torch

from lmcache.blend.rope import FusedRope, RopeFrequencies
from tests.kernels.fp8_numbers import real, rounded
from tests.kernels.needs_triton import DEVICE, FP8, require

require()

from lmcache.kernels.kv_read import deviation, read, read_among  # noqa: E402 - needs Triton
from lmcache.kernels.kv_rows import KVRows  # noqa: E402
from lmcache.kernels.kv_write import Turns, place, write  # noqa: E402

BLOCK, TOKENS, MOVED = 16, 100, 60
NAN = 0x7F
"""A NaN of both types."""
SCALES = (0.037, 2.5)


class Pages:
    """Poisoned pages, and rows of them."""

    def __init__(self, dtype: torch.dtype, heads: int, dim: int) -> None:
        shape = (9, 2, BLOCK, heads, dim)
        self.bytes = torch.full(shape, NAN, dtype=torch.uint8, device=DEVICE)
        slots = torch.randperm(9 * BLOCK, device=DEVICE)[:TOKENS]
        strides = self.bytes.stride()
        offsets = slots // BLOCK * strides[0] + slots % BLOCK * strides[2]
        keys, values = self.bytes.view(dtype).unbind(1)
        scales = torch.tensor(SCALES, device=DEVICE).view(2, 1)
        self.rows = KVRows(keys, values, offsets, heads, dim, dim, strides[3], strides[3], 4, *scales)
        self._slots = slots

    def stored(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The fp8 numbers of ``rows``."""
        at = self._slots[rows]
        keys, values = self.bytes[at // BLOCK, :, at % BLOCK].view(self.rows.keys.dtype).unbind(1)
        return keys, values


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize(("heads", "dim", "rotary", "neox"), [(2, 64, 64, True), (3, 48, 32, True), (2, 40, 20, False)])
def test_moved_rows(heads: int, dim: int, rotary: int, neox: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pages = Pages(dtype, heads, dim)
    largest = torch.finfo(dtype).max
    staged = rounded(torch.randn(2 * TOKENS, heads * dim) * 3, dtype)
    k_from = torch.randperm(TOKENS)[:MOVED]
    v_from = TOKENS + torch.randperm(TOKENS)[:MOVED]
    staged[k_from[0]] = largest  # what turns beyond it
    codes = torch.randint(0, 256, (TOKENS, heads * dim), dtype=torch.uint8)
    staged[TOKENS:] = codes.view(dtype)  # values that are no numbers are moved as they are
    rows = torch.randperm(TOKENS)[:MOVED]
    frequencies = RopeFrequencies(1e4 ** -(torch.arange(rotary // 2) / (rotary // 2)))
    distances = torch.randint(-50, 50, (MOVED,))
    angles = (distances[:, None].double() * frequencies.inv_freq).to(DEVICE)
    every = torch.arange(MOVED, device=DEVICE).int()
    turns = Turns(angles.cos().float(), angles.sin().float(), every, neox)
    on_device = [x.to(DEVICE) for x in (staged, k_from.int(), v_from.int(), rows.int())]
    place(*on_device, pages.rows, turns)

    keys, values = (x.cpu() for x in pages.stored(rows.to(DEVICE)))
    assert torch.equal(values.view(torch.uint8).flatten(1), codes[v_from - TOKENS]), "values keep their bytes"
    assert int((pages.bytes != NAN).sum()) <= MOVED * 2 * heads * dim, "nothing else is written"
    assert int(keys.view(torch.uint8).eq(NAN).sum()) == 0
    rope = FusedRope(frequencies, head_size=dim, is_neox_style=neox)
    before = real(staged[k_from].view(MOVED, heads, dim), SCALES[0])
    exact = rope.fused_encode(torch.zeros(MOVED, dtype=torch.int64), distances, before.double())
    in_torch = rounded(rope.fused_encode(torch.zeros(MOVED, dtype=torch.int64), distances, before), dtype, SCALES[0])
    assert_as_exact(keys, in_torch, exact, SCALES[0])
    assert float(exact.abs().max()) > 1.2 * largest * SCALES[0], "something had to be saturated"
    assert float(keys.float().abs().max()) == largest

    place(*on_device, pages.rows, None)
    unmoved, _ = pages.stored(rows.to(DEVICE))
    assert torch.equal(unmoved.cpu().view(torch.uint8).flatten(1), staged[k_from].view(torch.uint8))


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("computed", [torch.float32, torch.float16, torch.bfloat16])
def test_fresh_rows(dtype: torch.dtype, computed: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, dim = 3, 40
    pages, rows = Pages(dtype, heads, dim), torch.randperm(TOKENS)[:MOVED].int().to(DEVICE)
    kv = pages.rows
    # Views with gaps, as engines hand them over
    fresh = (torch.randn(2, MOVED, heads + 1, 2 * dim, device=DEVICE) * 3).to(computed)[:, :, 1:, :dim]
    fresh[0, 0, 0, :2] = torch.tensor([6e4, -6e4])
    left_out = torch.where(torch.arange(MOVED, device=DEVICE) % 3 == 0, -1, rows).int()
    write(*fresh, left_out, kv)
    assert int((pages.bytes != NAN).sum()) <= int((left_out >= 0).sum()) * 2 * heads * dim
    write(*fresh, rows, kv)
    held = pages.stored(rows)
    for plane, stored, scale in zip(fresh, held, SCALES, strict=True):
        assert torch.equal(stored.float(), rounded(plane, dtype, scale).float()), "as if torch had written it"
    assert held[0][0, 0, :2].tolist() == [torch.finfo(dtype).max * sign for sign in (1, -1)]

    dense = read(kv, rows)
    assert all(plane.dtype == torch.float32 for plane in dense)
    for plane, stored, scale in zip(dense, held, SCALES, strict=True):
        assert torch.equal(plane, real(stored, scale))
    assert all(int(plane.abs().sum()) == 0 for plane in read(kv, torch.full((5,), -1, device=DEVICE).int()))

    others = torch.randn(2, MOVED, heads, dim, device=DEVICE).to(computed)
    second = torch.arange(MOVED, device=DEVICE) % 2 == 0
    among = read_among(kv, rows, *others, torch.where(second, torch.arange(MOVED, device=DEVICE), -1).int())
    for plane, other, held_there in zip(among, others, dense, strict=True):
        assert torch.equal(plane[second], other[second])
        # The interpreter does not round bfloat16 to the nearest.
        eps = torch.finfo(computed).eps
        torch.testing.assert_close(plane[~second], held_there[~second].to(computed), atol=0, rtol=2 * eps)
    for change, other, plane in zip(deviation(*others, rows, kv), others, dense, strict=True):
        torch.testing.assert_close(change, (other.float() - plane).square().flatten(1).sum(1))

    before = [stored.clone() for stored in held]
    write(*others, rows, kv, add=True)
    for stored, old, other, scale in zip(pages.stored(rows), before, others, SCALES, strict=True):
        exact = old.double() * scale + other.double()
        assert_as_exact(stored, rounded(real(old, scale) + other.float(), dtype, scale), exact, scale)


def assert_as_exact(stored: torch.Tensor, in_torch: torch.Tensor, exact: torch.Tensor, scale: float) -> None:
    """As close to the ``exact`` numbers as torch comes with the same rounding: what float32 leaves out before decides
    but the few that lie between two numbers of fp8."""
    largest = torch.finfo(stored.dtype).max * scale
    within = exact.clamp(-largest, largest)
    ours, theirs = ((x.double() * scale - within).abs() for x in (stored, in_torch))
    assert float(ours.norm()) <= 1.001 * float(theirs.norm())
    assert float((ours - theirs).max()) <= 1e-5 * float(within.abs().max())
    assert float((stored.float() != in_torch.float()).float().mean()) < 1e-3
