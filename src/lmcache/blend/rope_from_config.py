"""The ropes of a model, from its Hugging Face config.

Reads the config of transformers 5 (``rope_parameters``, possibly one a layer type) and the older one (``rope_theta``,
``rope_scaling``, ``partial_rotary_factor``). Imports nothing of transformers: any object with these attributes does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from lmcache.blend.rope import FrequenciesAtLength, FusedRope, RopeFrequencies, UnsupportedRopeError
from lmcache.blend.rope_scaling import (
    default_frequencies,
    dynamic_ntk_frequencies,
    linear_frequencies,
    llama3_frequencies,
    longrope_frequencies,
    yarn_frequencies,
)

Parameters: TypeAlias = "Mapping[str, Any]"

_ANY = ""  # any layer type

# What a config does not say. Model types whose keys lie in transformers' cache as pairs (2i, 2i + 1) …
_INTERLEAVED = frozenset(
    {
        "codegen",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "ernie4_5",
        "ernie4_5_moe",
        "glm",
        "glm4",
        "gptj",
        "helium",
        "llama4_text",
    }
)
# … whose full-attention layers have no positions …
_ROPE_IN_SLIDING_LAYERS_ONLY = frozenset({"afmoe", "cohere2", "exaone4", "exaone_moe"})
# … which have RoPE with a base that is not in the config …
_THETA = {"codegen": 10_000.0, "gptj": 10_000.0}
# … whose text positions have several axes even when the config names no mrope_section (prefixes of model types) …
_MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen3_vl", "qwen3_omni", "qwen3_5", "glm4v", "glm_ocr")
# … and that turn backwards (nanochat), skip layers or vary the head in ways of their own.
_OWN_WAYS = ("cohere2_moe", "gemma4", "nanochat")


def ropes_from_config(config: Any) -> list[FusedRope | None]:
    """One rope a layer; None for a layer without positions, whose keys need no move. Equal layers share one object.

    Where frequencies depend on the length, it means what it means in transformers: each forward decides, by its largest
    position plus one. An engine that decides once, as vLLM does by ``max_model_len``, wants ``rope.at_length(…)``.

    Args:
        config: a ``PretrainedConfig``, or that of a multimodal model with a text part.

    Raises:
        UnsupportedRopeError: the model has no RoPE, one on several axes, or one that is not known here.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    shared: dict[str, FusedRope] = {}
    ropes: list[FusedRope | None] = []
    for parameters in _layer_parameters(config):
        if parameters is None:
            ropes.append(None)
            continue
        key = json.dumps(parameters, sort_keys=True, default=str)
        if key not in shared:
            shared[key] = _rope(config, parameters)
        ropes.append(shared[key])
    if not shared:
        raise _unsupported(config, "none of its layers has RoPE")
    return ropes


def _model_type(config: Any) -> str:
    return str(getattr(config, "model_type", None) or type(config).__name__)


def _unsupported(config: Any, reason: str) -> UnsupportedRopeError:
    return UnsupportedRopeError(
        f"{_model_type(config)} cannot be blended: {reason}, so a cached passage cannot be moved to another position. "
        "Reuse of exact prefixes works as ever."
    )


def _layer_parameters(config: Any) -> list[Parameters | None]:
    """The RoPE parameters of every layer, None where a layer has no positions."""
    by_type = _parameters_by_layer_type(config)
    num_layers: int | None = getattr(config, "num_hidden_layers", None)
    if num_layers is None:
        raise _unsupported(config, "its config does not say how many layers it has")
    layer_types = getattr(config, "layer_types", None) or [_ANY] * num_layers
    unknown = set(layer_types).difference(by_type) if _ANY not in by_type else ()
    if unknown:
        raise _unsupported(config, f"its RoPE parameters are those of {sorted(by_type)}, not of {sorted(unknown)}")
    by_layer = [by_type.get(layer_type, by_type.get(_ANY)) for layer_type in layer_types]

    has_rope = [True] * num_layers
    for layer, flag in enumerate(getattr(config, "no_rope_layers", None) or ()):  # despite its name, 1 is RoPE
        has_rope[layer] = bool(flag)
    for layer, theta in enumerate(getattr(config, "layer_rope_theta", None) or ()):
        has_rope[layer] = bool(theta)
        by_layer[layer] = {**(by_layer[layer] or {}), "rope_theta": theta}
    if _model_type(config) in _ROPE_IN_SLIDING_LAYERS_ONLY and getattr(config, "sliding_window", None) is not None:
        has_rope = [layer_type == "sliding_attention" for layer_type in layer_types]
    return [parameters if flag else None for parameters, flag in zip(by_layer, has_rope, strict=True)]


def _parameters_by_layer_type(config: Any) -> dict[str, Parameters | None]:
    """The RoPE parameters of each layer type; under ``_ANY`` where all types share them.

    Raises:
        UnsupportedRopeError: there are none, or the positions are of another kind.
    """
    if getattr(config, "alibi", False):
        raise _unsupported(config, "its positions are ALiBi biases")
    if _model_type(config).startswith(_OWN_WAYS):
        raise _unsupported(config, "it applies RoPE in a way of its own that is not known here")
    if getattr(config, "position_embedding_type", "rope") != "rope":  # None in a Granite hybrid without positions
        raise _unsupported(config, f"its position embedding is {config.position_embedding_type!r}, not RoPE")
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if given and all(value is None or isinstance(value, Mapping) for value in given.values()):
        by_type = dict(given)
    else:
        by_type = _spread(config, given)
    if _model_type(config).startswith(_MROPE) or any("mrope_section" in p for p in by_type.values() if p):
        raise _unsupported(config, "its positions have several axes (mRoPE)")
    return by_type


def _spread(config: Any, given: Parameters) -> dict[str, Parameters | None]:
    """``given`` is one flat set of parameters, to which older configs add attributes of their own."""
    model_type = _model_type(config)
    theta = given.get("rope_theta") or _attribute(config, "rope_theta", "rotary_emb_base") or _THETA.get(model_type)
    if theta is None:
        raise _unsupported(config, "it has no RoPE (its config names no rope_parameters and no rope_theta)")
    parameters = {**given, "rope_theta": theta}
    if parameters.get("partial_rotary_factor") is None:
        parameters["partial_rotary_factor"] = _attribute(config, "partial_rotary_factor", "rotary_pct")
    # Before transformers 5, Gemma-3 and OLMo-3 scaled their full-attention layers alone.
    sliding_theta = _attribute(config, "rope_local_base_freq") or (theta if model_type == "olmo3" else None)
    if sliding_theta is None:
        return {_ANY: parameters}
    return {"full_attention": parameters, "sliding_attention": {"rope_theta": sliding_theta}}


def _attribute(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _rope(config: Any, parameters: Parameters) -> FusedRope:
    model_type = _model_type(config)
    head_dim = _attribute(config, "qk_rope_head_dim", "head_dim") or config.hidden_size // config.num_attention_heads
    rotary_dim = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    if model_type in _THETA and config.rotary_dim is not None:
        rotary_dim = config.rotary_dim
    is_mla = _attribute(config, "qk_rope_head_dim") is not None
    return FusedRope(
        _frequencies(config, parameters, rotary_dim),
        head_size=None if is_mla else head_dim,
        is_neox_style=model_type not in _INTERLEAVED,
        rotary_at_end=is_mla,
    )


def _frequencies(config: Any, parameters: Parameters, rotary_dim: int) -> RopeFrequencies | FrequenciesAtLength:
    def given(*names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := parameters.get(name)) is not None}

    def required(*names: str) -> dict[str, Any]:
        found = given(*names)
        if len(found) < len(names):
            missing = sorted(set(names).difference(found))
            raise _unsupported(config, f"its RoPE parameters ({rope_type}) lack {', '.join(missing)}")
        return found

    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = float(parameters["rope_theta"])
    if rope_type == "default":
        return default_frequencies(rotary_dim, theta)
    if rope_type == "linear":
        return linear_frequencies(rotary_dim, theta, **required("factor"))

    # The other kinds know two lengths, that of pretraining and the one they stretch it to.
    longest: int = config.max_position_embeddings
    trained = _attribute(config, "original_max_position_embeddings") or parameters.get(
        "original_max_position_embeddings", longest
    )
    factor = parameters.get("factor") or longest / trained
    if rope_type == "dynamic" and not parameters.get("alpha"):
        return dynamic_ntk_frequencies(rotary_dim, theta, **required("factor"), max_position_embeddings=longest)
    if rope_type == "llama3":
        return llama3_frequencies(
            rotary_dim,
            theta,
            **required("factor", "low_freq_factor", "high_freq_factor"),
            original_max_position_embeddings=trained,
        )
    if rope_type == "yarn":
        return yarn_frequencies(
            rotary_dim,
            theta,
            factor=factor,
            original_max_position_embeddings=trained,
            **given("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        )
    if rope_type in ("longrope", "su") and "short_mscale" not in parameters:
        return longrope_frequencies(
            rotary_dim,
            theta,
            **required("short_factor", "long_factor"),
            original_max_position_embeddings=trained,
            factor=factor,
            **given("attention_factor"),
        )
    raise _unsupported(config, f"RoPE of the type {rope_type!r} with {sorted(parameters)} is not known here")
