"""Sparse-query attention and attention received, against their references in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcache.blend.attention import QueryMask
from lmcache.blend.attention import attention_received as received_reference
from lmcache.blend.attention import sparse_attention as attention_reference
from tests.kernels.fp8_numbers import real, rounded
from tests.kernels.needs_triton import DEVICE, DTYPES, FP8, require

require()

from lmcache.kernels.attention_received import attention_received  # noqa: E402 - needs Triton
from lmcache.kernels.kv_rows import KVRows  # noqa: E402
from lmcache.kernels.sparse_attention import sparse_attention  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "grouped": {"heads": (4, 2), "dim": 64},
    "odd sizes, split": {"heads": (6, 2), "dim": 48, "part_keys": 64},
    "window, sinks, holes": {"heads": (3, 3), "dim": 32, "window": 17, "sinks": True, "holes": True, "part_keys": 96},
    "soft cap": {"heads": (8, 1), "dim": 16, "softcap": 20.0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_torch(case: str, dtype: torch.dtype) -> None:
    compare(case, dtype, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", FP8)
@pytest.mark.parametrize("case", ["odd sizes, split", "window, sinks, holes", "soft cap"])
def test_rows_in_fp8(case: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    """What is read from fp8 is exact; torch is given the real numbers, rounded to the type of the queries."""
    compare(case, dtype, stored)


def test_wrong_scales_are_noticed() -> None:
    for wrong in ((0.13, 3.0), (0.12, 3.1)):
        with pytest.raises(AssertionError):
            compare("odd sizes, split", torch.float32, torch.float8_e4m3fn, used=wrong)


SCALES = (0.12, 3.0)


def compare(case: str, dtype: torch.dtype, stored: torch.dtype | None, used: tuple[float, float] = SCALES) -> None:
    torch.manual_seed(0)
    chosen = CASES[case]
    (heads, kv_heads), dim, window = chosen["heads"], chosen["dim"], chosen.get("window")
    q = torch.randn(37, heads, dim).to(dtype)
    # Rows of pages: neither dense nor in order
    keys, values = torch.randn(2, 160, kv_heads, dim).to(dtype)
    order = torch.randperm(160)[:150]
    if stored is not None:
        keys, values = (rounded(x, stored, scale) for x, scale in zip((keys, values), SCALES, strict=True))
    k, v = exact_k, exact_v = keys[order], values[order]
    if stored is not None:
        exact_k, exact_v = (real(x.double(), scale) for x, scale in zip((k, v), SCALES, strict=True))
        k, v = exact_k.to(dtype), exact_v.to(dtype)
    positions = torch.randperm(150)[:37].sort().values
    known = torch.ones(150, dtype=torch.bool)
    if chosen.get("holes"):
        known = torch.rand(150) < 0.6
        known[positions] = True
        values[order[~known]] = torch.nan
        v, exact_v = (torch.where(known[:, None, None], x, 0) for x in (v, exact_v))
    sinks = torch.randn(heads) if chosen.get("sinks") else None
    scoring = {"scale": dim**-0.5, "softcap": chosen.get("softcap"), "sinks": sinks}
    mask = QueryMask(positions, window, None if bool(known.all()) else known)
    exact = attention_reference(q.double(), exact_k.double(), exact_v.double(), mask, **scoring)
    in_torch = attention_reference(q, k, v, QueryMask(positions, window, mask.known), **scoring)

    rows = KVRows.of_tensors(keys.to(DEVICE), values.to(DEVICE))
    rows = KVRows(**{**vars(rows), "offsets": rows.offsets[order.to(DEVICE)]})
    if stored is not None:
        rows = rows.at(rows.keys, rows.values, *torch.tensor(used, device=DEVICE).view(2, 1))
    on_device: dict[str, Any] = {
        **scoring,
        "sinks": None if sinks is None else sinks.to(DEVICE),
        "sliding_window": window,
        "known": None if mask.known is None else mask.known.to(DEVICE),
    }
    at = positions.to(DEVICE, torch.int32)
    out, _ = sparse_attention(
        q.to(DEVICE), rows, at, **on_device, part_keys=chosen.get("part_keys", 160), blocks=(32, 32, 4, 1)
    )
    assert _error(out, exact) <= 1.5 * _error(in_torch, exact) + 1e-6

    wanted = torch.full_like(out, torch.nan)
    in_place, _ = sparse_attention(
        q.to(DEVICE), rows, at, **on_device, part_keys=chosen.get("part_keys", 160), blocks=(32, 32, 4, 1), out=wanted
    )
    assert in_place is wanted
    assert torch.equal(wanted, out)

    expected = received_reference(q[-5:], k, QueryMask(positions[-5:], window, mask.known), **scoring)
    received = attention_received(q[-5:].to(DEVICE), rows, at[-5:], **on_device)
    torch.testing.assert_close(received.cpu(), expected, atol=2e-3 if dtype != torch.float32 else 1e-6, rtol=1e-3)


def _error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.cpu().double() - exact).norm() / exact.norm())
