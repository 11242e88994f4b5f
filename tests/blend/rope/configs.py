"""Small models of transformers, one a kind of RoPE: as small as they run, with the real ones' positions."""

from __future__ import annotations

from typing import Any

import transformers as hf

_TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 512}
_DEEPSEEK_YARN = {**_YARN, "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.1, 1.5, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0],
    "original_max_position_embeddings": 512,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
_MLA = {"kv_lora_rank": 24, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}


def _tiny(kind: type[Any], without: tuple[str, ...] = (), **settings: Any) -> Any:
    return kind(**{name: value for name, value in _TINY.items() if name not in without}, **settings)


def llama(rope_parameters: dict[str, Any] | None = None, max_position_embeddings: int = 4096) -> Any:
    return _tiny(
        hf.LlamaConfig,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=dict(rope_parameters) if rope_parameters else None,
    )


def deepseek(kind: type[Any]) -> Any:
    return _tiny(
        kind,
        without=("head_dim", "num_key_value_heads"),
        num_key_value_heads=4,
        max_position_embeddings=512 * 40,
        rope_parameters=dict(_DEEPSEEK_YARN),
        first_k_dense_replace=1,
        **_MLA,
        **_EXPERTS,
    )


def configs() -> dict[str, Any]:
    """By name. None of them changes its frequencies with the length."""
    layers = {"num_hidden_layers": 4}
    no_layers = ("num_hidden_layers",)
    mixed = {**layers, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
    return {
        "llama": llama(),
        "llama linear": llama({"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
        "llama 3.1": llama(_LLAMA3, 131_072),
        "llama yarn": llama(_YARN),
        "llama yarn truncate": llama({**_YARN, "truncate": False, "beta_fast": 16, "attention_factor": 1.7}),
        "mistral": _tiny(hf.MistralConfig),
        "mixtral": _tiny(hf.MixtralConfig, num_local_experts=2),
        "qwen2": _tiny(hf.Qwen2Config, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "qwen3": _tiny(hf.Qwen3Config),
        "gemma2": _tiny(hf.Gemma2Config, query_pre_attn_scalar=16),
        "gemma3": _tiny(hf.Gemma3TextConfig, no_layers, query_pre_attn_scalar=16, **mixed),
        "olmo3": _tiny(
            hf.Olmo3Config,
            (*no_layers, "head_dim"),
            **mixed,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": dict(_YARN),
            },
        ),
        "phi3": _tiny(hf.Phi3Config),
        "gpt_neox": _tiny(hf.GPTNeoXConfig, ("num_key_value_heads", "head_dim"), rotary_pct=0.25),
        "stablelm": _tiny(hf.StableLmConfig, ("head_dim",), rope_parameters={"partial_rotary_factor": 0.5}),
        "glm4": _tiny(hf.Glm4Config),
        "gptj": hf.GPTJConfig(vocab_size=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
        "cohere": _tiny(hf.CohereConfig, ("head_dim",)),
        "cohere2": _tiny(hf.Cohere2Config, no_layers, **mixed),
        "smollm3": _tiny(hf.SmolLM3Config, no_layers, **layers),
        "llama4": _tiny(hf.Llama4TextConfig, no_layers, **layers, intermediate_size_mlp=64, num_local_experts=2),
        "exaone4": _tiny(hf.Exaone4Config, no_layers, **mixed),
        "gpt_oss": _tiny(hf.GptOssConfig, num_local_experts=4, num_experts_per_tok=2),
        "deepseek_v2": deepseek(hf.DeepseekV2Config),
        "deepseek_v3": deepseek(hf.DeepseekV3Config),
    }


def phi3_longrope() -> Any:
    return _tiny(
        hf.Phi3Config,
        max_position_embeddings=4096,
        original_max_position_embeddings=512,
        rope_parameters=dict(LONGROPE),
    )
