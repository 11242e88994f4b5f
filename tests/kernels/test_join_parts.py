"""Parts of attention, and of softmax sums, are joined as torch joins them."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.needs_triton import DEVICE, require

require()

from lmcache.kernels.join_parts import join_attention, join_log2_sums  # noqa: E402 - needs Triton


@pytest.mark.parametrize(("parts", "queries", "heads", "dim"), [(1, 1, 1, 16), (3, 5, 2, 80), (7, 3, 14, 64)])
def test_attention(parts: int, queries: int, heads: int, dim: int) -> None:
    torch.manual_seed(0)
    out = torch.randn(parts, queries, heads, dim, device=DEVICE)
    lse = 30 * torch.randn(parts, queries, heads, device=DEVICE)
    lse[1:, 0] = -1.0e30  # what sees nothing in a part weighs nothing there
    joint = lse.logsumexp(0)
    expected = (out * torch.exp(lse - joint)[..., None]).sum(0)
    out[1:, 0] = torch.nan
    got = torch.empty(queries, heads, dim, device=DEVICE)
    got_joint = join_attention(out, lse, got)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_joint, joint, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("parts", "heads", "queries"), [(1, 1, 1), (31, 3, 5), (32, 2, 8), (100, 14, 3)])
def test_sums(parts: int, heads: int, queries: int) -> None:
    torch.manual_seed(0)
    sums = 30 * torch.randn(parts, heads, queries, device=DEVICE)
    sums[1:, 0] = -1.0e30
    expected = torch.logsumexp(sums.double() * 0.6931471805599453, 0) / 0.6931471805599453
    torch.testing.assert_close(join_log2_sums(sums), expected.float(), atol=1e-4, rtol=1e-5)
