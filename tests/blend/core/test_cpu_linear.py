"""Products on a CPU, whatever its processor has instructions for."""

from __future__ import annotations

import pytest
import torch

from lmcache.blend import cpu_linear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("supported", [None, {torch.float32}, set()], ids=["this machine", "no halves", "no oneDNN"])
@pytest.mark.parametrize("mkl", [False, True], ids=["another make", "MKL's make"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("room", [False, True], ids=["new", "in room"])
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_is_as_exact_as_the_dtype_on_every_processor(
    monkeypatch: pytest.MonkeyPatch,
    supported: set[torch.dtype] | None,
    mkl: bool,
    dtype: torch.dtype,
    room: bool,
    transposed: bool,
) -> None:
    monkeypatch.setattr(cpu_linear, "_MKL_FOR_FLOAT32", mkl)
    if supported is not None:
        monkeypatch.setattr(cpu_linear, "_ONEDNN_DTYPES", frozenset(supported))
    torch.manual_seed(1)
    x = torch.randn(37, 61).to(dtype)
    weight = torch.randn(61, 23).T.to(dtype) if transposed else torch.randn(23, 61).to(dtype)
    out = torch.full((37, 23), float("nan"), dtype=dtype) if room else None
    product = cpu_linear.linear(x, cpu_linear.as_weights(weight), out)
    wanted = x.double() @ weight.double().T
    assert product.dtype == dtype
    assert (product.double() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()


def test_this_machine_is_asked_what_it_multiplies() -> None:
    """Regression: bfloat16 went to oneDNN on processors without AVX-512, where it refuses it with an error."""
    for dtype in cpu_linear._onednn_dtypes():
        x = torch.ones(3, 5, dtype=dtype)
        product = torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
        assert torch.equal(product, torch.full((3, 3), 5, dtype=dtype))
