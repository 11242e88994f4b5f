"""Blends in a real vLLM: its own models, run on chosen rows in the middle of a step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.blend.harness import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Cohere-2 has rotary modules that half of its layers do not use; GPT-OSS has attention sinks and YaRN; Gemma-2 has soft
# caps and, like Mistral, windows that are shorter than the passages.
ROTATED = {
    name: [0, 2] if name == "cohere2" else [0, 1, 2, 3]
    for name in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "cohere2", "gpt-oss")
}

REFUSED = {
    "llama+lora": (
        "LlamaForCausalLM",
        "LoRA is on, and vLLM sets the adapter of each row for its own forward only",
    ),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        "model.layers.0.self_attn.attn is of type MLAAttention; only plain attention over the K and V of single tokens "
        "is supported",
    ),
    "bloom": ("BloomForCausalLM", "transformer.h.0.self_attention.attn adds ALiBi to its scores"),
    "gpt2": ("GPT2LMHeadModel", "there is no rotary_emb beside transformer.h.0.attn.attn"),
}

# Between logprobs of float32 models with 4 layers, in which sums are made in another order
ROUNDING = 1e-4
# What a blend that is wrong differs by at least
WRONG = 0.1


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    return run("blends", list(ROTATED))


@pytest.mark.parametrize("name", ROTATED)
def test_blends_of_a_model(name: str, answers: dict[str, Any]) -> None:
    answer = answers[name]
    assert answer["rotated"] == ROTATED[name]
    assert answer["fallbacks"] == []

    assert answer["nothing_cached"] < ROUNDING, "a pass without reuse is vLLM's own prefill"
    assert answer["full"] < ROUNDING, "and so is one that recomputes all that it could reuse, in a batch with another"
    assert answer["none"] > WRONG, "passages from another prompt are not what this prompt would make of them"

    chosen = answer["chosen"]
    assert chosen == {"none": 0, "kv_deviation": 18, "query_attention": 18}, "30 % of 61"
    assert all(distance < ROUNDING for distance in answer["from_definition"].values()), answer["from_definition"]
    assert answer["unrotated_from_definition"] > WRONG, "the negative control: keys that stay where they were"

    assert answer["raised"] == "KeyError('from attend')", "exceptions pass vLLM's ops as they are"
    assert answer["found_anywhere"], "with the plug-in, the model is found from outside of vLLM's calls too"


def test_models_that_cannot_be_blended_are_refused_without_the_plug_in_too() -> None:
    answers = run("refusal", ["llama", *REFUSED], VLLM_PLUGINS="none")
    assert answers.pop("llama") == {"found_anywhere": False}, "register_kv_caches found it, and it fits"
    assert answers == {
        name: {"refused": f"{model} cannot be blended: {reason}. Reuse of exact prefixes works as ever."}
        for name, (model, reason) in REFUSED.items()
    }
