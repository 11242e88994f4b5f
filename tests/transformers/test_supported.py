"""What cannot be blended is refused, in words that tell which model, why, and what still works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lmcache.blend.rope import FusedRope
from lmcache.blend.rope_scaling import default_frequencies
from lmcache.integration.transformers import CacheBlend, UnsupportedModelError
from lmcache.integration.transformers.host import TransformersModel
from lmcache.integration.transformers.supported import supported_ropes
from lmcache.integration.transformers.trial import try_out
from tests.transformers.small_models import CONFIGS, VOCAB, rope, small_model

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "GPT2": ({"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2}, "no RoPE"),
    "Bloom": ({"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2}, "attention interface|no RoPE"),
    "Mamba": ({"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}, "linear_attention|attention interface"),
    "StableLm": (_SMALL, "attention interface"),
    "Lfm2": ({**_SMALL, "layer_types": ["conv", "full_attention"]}, "conv"),
    "DeepseekV3": ({**_SMALL, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, "MLA"),
    "Qwen3Next": (
        {**_SMALL, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2},
        "linear_attention",
    ),
    "Gemma3nText": (
        {**_SMALL, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4}
        | {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
        "share the KV",
    ),
    "Llama4Text": (
        {**_SMALL, "layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2, "head_dim": 16},
        "chunked_attention",
    ),
    "Llama": (
        {**_SMALL, **rope("dynamic", factor=2.0)},
        "dynamic NTK",
    ),
    # Sliding-window masks are made, but the attention function is not told.
    "Qwen2Moe": (
        {**_SMALL, "use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}
        | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
        "sliding window|attention interface",  # the latter in transformers 4
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_words(kind: str) -> None:
    options, reason = REFUSED[kind]
    config = getattr(transformers, f"{kind}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        CacheBlend(model)
    assert type(model).__name__ in str(refusal.value)
    assert str(refusal.value).count("Reuse of exact prefixes") == 1


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        CacheBlend(transformers.T5ForConditionalGeneration(config).eval())


def test_a_model_without_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        CacheBlend(small_model("llama").model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel"):
        CacheBlend(torch.nn.Linear(2, 2))


# What the config does not tell is found out by a trial.


def _llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_passes_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name](), dtype=dtype, attn_implementation="eager" if name == "gemma2" else None
    ).eval()
    try_out(TransformersModel(model), supported_ropes(model))


def test_another_rotation_than_the_configs_is_found() -> None:
    model = _llama()
    wrong = FusedRope(default_frequencies(16, 20_000.0), head_size=16)
    with pytest.raises(UnsupportedModelError, match=r"keys of layer 0 .* RoPE"):
        try_out(TransformersModel(model), [wrong] * 4)


def test_frequencies_that_were_rounded_with_the_weights_are_found() -> None:
    model = _llama().to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="pass dtype="):
        try_out(TransformersModel(model), supported_ropes(model))


class _MixesNeighbours(torch.nn.Module):
    """Each token also sees the one before it, as in a short convolution."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.inner(hidden + hidden.roll(1, dims=1))
        return mixed


def test_mixing_of_neighbours_outside_attention_is_found() -> None:
    model = _llama()
    model.model.layers[1].mlp = _MixesNeighbours(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedModelError, match="values of layer 2 depend on"):
        CacheBlend(model)


def test_attention_that_does_more_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama()
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        own = attention.config._attn_implementation == "sdpa"
        out, weights = plain(*args, **kwargs)
        return (out * 2 if own else out), weights

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="layer 1 differ from those of its own forward"):
        CacheBlend(model)


def test_a_layer_without_attention_is_found() -> None:
    model = _llama()
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with pytest.raises(UnsupportedModelError, match=r"layers \[0, 2, 3\]"):
        CacheBlend(model)
