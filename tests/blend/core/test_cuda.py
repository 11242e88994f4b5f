"""The blend on a GPU gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from lmcache.blend.batch import BlendPrompt
from lmcache.blend.blend_pass import blend
from tests.blend.core.test_blend import ROPES, AsItIs, Asking, Everything, Gradual, two_passages
from tests.blend.core.tiny_model import LayerKVPair, Stored, TinyHost, TinyModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("source_device", ["cpu", "cuda"])
@pytest.mark.parametrize("policy", [Asking, Gradual, Everything])
def test_equals_the_cpu(policy, source_device):
    ids, prompt = two_passages()
    sources = [
        Stored([LayerKVPair(pair.k.to(source_device), pair.v.to(source_device)) for pair in source.kv])
        for source in prompt.sources
    ]
    on_cpu = blend(TinyHost(TinyModel(), [ids]), [prompt], ROPES, policy(), AsItIs())
    host = TinyHost(TinyModel(device="cuda"), [ids])
    on_gpu = blend(host, [BlendPrompt(prompt.plan, sources, prompt.ratio)], ROPES, policy(), AsItIs())
    assert on_gpu.plans == on_cpu.plans
    assert on_gpu.keys[0].is_cuda
    torch.testing.assert_close(on_gpu.output.cpu(), on_cpu.output, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(on_gpu.values, on_cpu.values, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)
