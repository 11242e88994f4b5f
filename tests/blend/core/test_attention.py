from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.blend import cpu_linear
from lmcache.blend.attention import QueryMask, attention_received, sparse_attention
from tests.blend.core.tiny_model import naive_attention, naive_weights


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    num_keys = draw(st.integers(1, 150))
    rows = sorted(draw(st.sets(st.integers(0, num_keys - 1), min_size=1, max_size=90)))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    known = None
    if draw(st.booleans()):
        known = torch.rand(num_keys, generator=generator) < 0.7
        known[rows] = True
    return {
        "q": normal(len(rows), kv_heads * group, 8),
        "k": normal(num_keys, kv_heads, 8),
        "v": normal(num_keys, kv_heads, draw(st.sampled_from([8, 5]))),
        "positions": torch.tensor(rows),
        "sliding_window": draw(st.sampled_from([None, 1, 7, 1000])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": normal(kv_heads * group) if draw(st.booleans()) else None,
        "known": known,
    }


@given(cases(), st.booleans())
def test_equals_attention_one_query_and_one_head_at_a_time(case, mkl):
    mask = QueryMask(case["positions"], case["sliding_window"], case["known"])
    shape = {"scale": 0.3, "softcap": case["softcap"], "sinks": case["sinks"]}
    with patch.object(cpu_linear, "_MKL_FOR_FLOAT32", mkl):
        ours = sparse_attention(case["q"], case["k"], case["v"], mask, **shape)
    torch.testing.assert_close(ours, naive_attention(**case, scale=0.3), rtol=1e-5, atol=1e-5)

    received = attention_received(case["q"], case["k"], mask, **shape)
    group = case["q"].shape[1] // case["k"].shape[1]
    for head in range(case["q"].shape[1]):
        each = [
            naive_weights(
                case["q"][i, head],
                case["k"][:, head // group],
                position,
                0.3,
                case["sliding_window"],
                case["softcap"],
                case["sinks"],
                case["known"],
                head,
            )
            for i, position in enumerate(case["positions"].tolist())
        ]
        torch.testing.assert_close(received[head], torch.stack(each).mean(0).float(), rtol=1e-5, atol=1e-5)


def test_a_scattered_query_never_sees_its_future():
    """A bottom-right causal mask over scattered rows would: the first query here is the second of three rows."""
    k, v = torch.randn(10, 1, 4), torch.randn(10, 1, 4)
    q = torch.randn(3, 1, 4)
    mask = QueryMask(torch.tensor([2, 5, 9]))
    before = sparse_attention(q, k, v, mask, scale=1.0)
    k[3:], v[3:] = 1e4, 1e4
    after = sparse_attention(q, k, v, mask, scale=1.0)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_the_dtype_of_the_queries(dtype):
    q, k, v = (torch.randn(5, 2, 8, dtype=dtype) for _ in range(3))
    for softcap in (None, 30.0):
        out = sparse_attention(q, k, v, QueryMask(torch.arange(5)), scale=0.3, softcap=softcap)
        expected = naive_attention(q.double(), k.double(), v.double(), torch.arange(5), scale=0.3, softcap=softcap)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_masks_too_large_to_keep_are_made_again(monkeypatch):
    monkeypatch.setattr("lmcache.blend.attention._MAX_KEPT_MASK", 10)
    q, k, v = (torch.randn(130, 1, 4, dtype=torch.float64) for _ in range(3))
    mask = QueryMask(torch.arange(130), sliding_window=9)
    ours = sparse_attention(q, k, v, mask, scale=1.0)
    torch.testing.assert_close(
        ours, naive_attention(q, k, v, torch.arange(130), scale=1.0, sliding_window=9), rtol=1e-6, atol=1e-6
    )
