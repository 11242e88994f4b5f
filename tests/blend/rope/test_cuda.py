"""Keys on a GPU are turned as on the CPU, wherever the positions are."""

from __future__ import annotations

import pytest
import torch

from lmcache.blend.rope import FusedRope
from lmcache.blend.rope_scaling import default_frequencies

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("positions_on", ["cpu", "cuda"])
@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alike", [True, False])
def test_equals_the_cpu(alike, dtype, is_neox_style, positions_on):
    rope = FusedRope(default_frequencies(64, 1e4), head_size=128, is_neox_style=is_neox_style)
    k = torch.randn(600, 8, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    on_gpu = k.cuda()
    old = torch.arange(600)
    new = old + 100_000 if alike else old.flip(0)
    rope.fused_encode(old.to(positions_on), new.to(positions_on), on_gpu)
    rope.fused_encode(old, new, k)
    torch.testing.assert_close(on_gpu.cpu(), k, rtol=torch.finfo(dtype).eps, atol=1e-5)
