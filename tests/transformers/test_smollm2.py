"""The ten lines of the README, and exact reuse, on the real SmolLM2-135M-Instruct."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcache.blend.plan import Reason
from lmcache.integration.transformers import BlendedPrompt, CacheBlend
from tests.vllm.harness import model_path

pytestmark = pytest.mark.skipif(not model_path().exists(), reason="needs the model: make setup")

SYSTEM = "<|im_start|>system\nAnswer from the passages, in one short sentence.<|im_end|>\n<|im_start|>user\n"
PASSAGES = [
    "The lighthouse of Corvin Bay was built in 1874. Its keeper today is Marta Oduya, who lives beside it.\n\n",
    "The ferry to Corvin Bay leaves from Harrow Quay at 9:40 every morning and comes back at 17:15.\n\n",
    "The museum of Corvin Bay shows ship models. It is closed on Mondays and costs four crowns.\n\n",
]
QUESTION = "What is the name of the lighthouse keeper?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so that equal means equal
    yield AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    torch.set_num_threads(threads)


def answer(model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor]) -> str:
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def plain_inputs(parts: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[token for part in parts for token in part]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("page", ["README.md", "docs/cacheblend.md"])
def test_the_example_runs_as_it_is_written(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / page).read_text()
    (example,) = re.findall(r"```python\n(.*?CacheBlend.*?)```", text, re.DOTALL)
    names = {"path": model_path(), "texts": [SYSTEM, *PASSAGES, QUESTION]}
    exec(compile(example, page, "exec"), names)
    assert "Marta Oduya" in capsys.readouterr().out
    result = names["result"]
    assert isinstance(result, BlendedPrompt)
    assert 0.1 < result.report.charged_budget < 0.2
    assert Reason.MOVED in {part.reason for part in result.plan.ranges()}


def test_an_exact_prefix_gives_the_text_that_no_cache_gives(model: Any, tokenizer: Any) -> None:
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in (SYSTEM, PASSAGES[0], QUESTION)]
    with CacheBlend(model) as blend:
        blend.cache(parts[1], behind=parts[0])
        result = blend.prefill(parts)
        assert [part.reason for part in result.plan.ranges()] == [Reason.EXACT, Reason.EXACT, Reason.NOT_CACHED]
        assert answer(model, tokenizer, result.generate_inputs()) == answer(model, tokenizer, plain_inputs(parts))


def test_a_full_prefill_through_the_blend_gives_the_same_text_and_reuse_alone_does_not(
    model: Any, tokenizer: Any
) -> None:
    """With the ferry question, whose answer goes wrong when passages know nothing of each other."""
    question = "From which quay does the ferry leave?<|im_end|>\n<|im_start|>assistant\n"
    texts = [SYSTEM, *reversed(PASSAGES), question]
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    expected = answer(model, tokenizer, plain_inputs(parts))
    assert "Harrow Quay" in expected
    with CacheBlend(model) as blend:
        for passage in parts[1:-1]:
            blend.cache(passage, behind=parts[0])
        full = blend.prefill(parts, policy="full")
        reused = blend.prefill(parts, policy="none", corrector="none")
        assert answer(model, tokenizer, full.generate_inputs()) == expected
        assert answer(model, tokenizer, reused.generate_inputs()) != expected
    own = model(plain_inputs(parts)["input_ids"], logits_to_keep=1).logits[0, -1].detach()
    torch.testing.assert_close(full.logits, own, atol=1e-4, rtol=0)
