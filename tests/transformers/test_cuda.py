"""A model on a GPU, its passages in host memory."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from lmcache.integration.transformers import CacheBlend
from tests.transformers.small_models import (
    continuation,
    own_continuation,
    own_prefill,
    random_ids,
    small_model,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SYSTEM, DOC_A, DOC_B, QUESTION = (random_ids(count, seed) for seed, count in enumerate((7, 18, 15, 9)))
PROMPT = [SYSTEM, DOC_B, DOC_A, QUESTION]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt-neox", "mixtral", "gpt-oss"])
def test_equals_full_prefill_and_the_cpu(name: str) -> None:
    on_cpu = small_model(name)
    model = deepcopy(on_cpu).cuda()
    ids = torch.cat(PROMPT)
    with CacheBlend(model) as blend, CacheBlend(on_cpu) as cpu_blend:
        for passage in (DOC_A, DOC_B):
            blend.cache(passage.cuda(), behind=SYSTEM)
            cpu_blend.cache(passage, behind=SYSTEM)
        full = blend.prefill(PROMPT, ratio=1.0)
        some, some_on_cpu = blend.prefill(PROMPT, ratio=0.3), cpu_blend.prefill(PROMPT, ratio=0.3)
    assert full.logits.is_cuda
    assert full.keys[0].is_cuda
    torch.testing.assert_close(full.logits, own_prefill(model, ids.cuda()).logits, atol=1e-4, rtol=0)
    assert torch.equal(continuation(model, full, 16), own_continuation(model, ids.cuda(), 16))
    assert some.plan == some_on_cpu.plan
    torch.testing.assert_close(some.logits.cpu(), some_on_cpu.logits, atol=1e-3, rtol=0)
