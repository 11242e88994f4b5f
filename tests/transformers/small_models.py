"""Small models with random weights, of every architecture that is known to blend; windows shorter than the prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers

from lmcache.integration.transformers import BlendedPrompt

VOCAB = 97
WINDOW = 12

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # Wide enough for attention to be far from uniform.
    "initializer_range": 0.15,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2


def _config(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{kind}Config")(**{**_COMMON, **options})


def rope(rope_type: str, **options: Any) -> dict[str, Any]:
    if transformers.__version__.startswith("4."):
        return {"rope_theta": 10_000.0, "rope_scaling": {"type": rope_type, **options}}
    return {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": rope_type, **options}}


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _config("Llama"),
    "llama-llama3-rope": _config(
        "Llama",
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn": _config("Llama", **rope("yarn", factor=4.0, original_max_position_embeddings=1024)),
    "mistral": _config("Mistral", sliding_window=WINDOW),
    "qwen2": _config("Qwen2"),
    "qwen2-window": _config(
        "Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2, layer_types=_ALTERNATING
    ),
    "qwen3": _config("Qwen3", head_dim=32),
    "gemma2": _config(
        "Gemma2", head_dim=32, sliding_window=WINDOW, attn_logit_softcapping=5.0, query_pre_attn_scalar=32
    ),
    "gemma3": _config(
        "Gemma3Text", head_dim=32, sliding_window=WINDOW, layer_types=_ALTERNATING, query_pre_attn_scalar=32
    ),
    "phi3": _config("Phi3"),
    "phi3-longrope": _config(
        "Phi3",
        max_position_embeddings=2048,
        original_max_position_embeddings=40,
        **rope("longrope", short_factor=[1.0] * 8, long_factor=[1.0 + i / 4 for i in range(8)]),
    ),
    "gpt-neox": _config("GPTNeoX", rotary_pct=0.25, hidden_act="gelu", **rope("default")),
    "mixtral": _config("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": _config(
        "Qwen3Moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "olmo2": _config("Olmo2"),
    "smollm3": _config("SmolLM3", no_rope_layers=[1, 1, 1, 0], no_rope_layer_interval=4),
    "granite": _config(
        "Granite", attention_multiplier=0.2, residual_multiplier=0.5, embedding_multiplier=3.0, logits_scaling=2.0
    ),
    "cohere2": _config("Cohere2", sliding_window=WINDOW, layer_types=_ALTERNATING, logit_scale=0.5),
    "gpt-oss": _config(
        "GptOss",
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
        num_local_experts=4,
        num_experts_per_tok=2,
        **rope("yarn", factor=4.0, original_max_position_embeddings=1024, truncate=False),
    ),
    "glm4": _config("Glm4", head_dim=16, partial_rotary_factor=0.5),
    "starcoder2": _config("Starcoder2", sliding_window=WINDOW),
    "phi": _config("Phi", partial_rotary_factor=0.5),
    "cohere": _config("Cohere"),
    "exaone4": _config("Exaone4", sliding_window=WINDOW, layer_types=_ALTERNATING),
}


@cache
def small_model(name: str, seed: int = 0, attention: str | None = None) -> Any:
    """In eval mode, float32. Shared by tests: nobody may change it."""
    torch.manual_seed(seed)
    # Gemma-2's soft caps are left out by "sdpa".
    attention = attention or ("eager" if name == "gemma2" else None)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name](), dtype=torch.float32, attn_implementation=attention
    )
    if name == "gpt-oss":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model.eval()


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Prefill:
    """``logits`` ``[vocab]`` of the last token; ``keys`` and ``values`` ``[N, kv_heads, dim]`` a layer."""

    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


@torch.no_grad()
def own_prefill(model: Any, ids: torch.Tensor) -> Prefill:
    """By the model alone. A cache that was given no config keeps all tokens of sliding layers too."""
    held = transformers.DynamicCache()
    output = model(input_ids=ids[None], past_key_values=held, use_cache=True)
    return Prefill(
        output.logits[0, -1],
        [layer.keys[0].transpose(0, 1) for layer in held.layers],
        [layer.values[0].transpose(0, 1) for layer in held.layers],
    )


def own_continuation(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` greedy tokens by the model alone."""
    output: torch.Tensor = model.generate(
        ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=count, do_sample=False
    )
    return output[0, len(ids) :]


def continuation(model: Any, blended: BlendedPrompt, count: int) -> torch.Tensor:
    """``count`` greedy tokens behind a blend."""
    output: torch.Tensor = model.generate(**blended.generate_inputs(), max_new_tokens=count, do_sample=False)
    return output[0, blended.input_ids.shape[1] :]
