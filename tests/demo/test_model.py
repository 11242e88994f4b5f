"""The model that scripts/prepare_model.py converts: weights, their order, and the tokenizer are right."""

from __future__ import annotations

import pytest
import torch

from tests.vllm.harness import model_path

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.vllm  # needs the environment that vLLM needs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_answers(dtype: torch.dtype) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_text_survives_the_tokenizer() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    text = "<|im_start|>user\nPier 12 is  210 m long – naïve? 你好 🛟\n\n<|im_end|>"
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens[-1] == tokenizer.eos_token_id
