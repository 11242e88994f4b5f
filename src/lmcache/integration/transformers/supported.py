"""Which models can be blended, as far as their config tells. What only a run can tell is in ``trial``."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from lmcache.blend.rope import FusedRope, UnsupportedRopeError
from lmcache.blend.rope_from_config import ropes_from_config

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


class UnsupportedModelError(ValueError):
    """This model cannot be blended. The message names it, says why, and what still works."""


def unsupported(model: Any, reason: str) -> UnsupportedModelError:
    """The error for a model, or for one of its layers."""
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be blended: {reason}. Reuse of exact prefixes (transformers' own "
        "past_key_values) works as ever."
    )


def supported_ropes(model: Any) -> list[FusedRope | None]:
    """The rope of every layer of a model whose config holds nothing against blending it.

    Raises:
        UnsupportedModelError: it does.
        TypeError: this is no transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers PreTrainedModel, got {type(model).__name__}")
    if (reason := _reason_against(model)) is not None:
        raise unsupported(model, reason)
    try:
        return ropes_from_config(model.config)
    except UnsupportedRopeError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error}") from None


def _reason_against(model: Any) -> str | None:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "an encoder-decoder reads its prompt with attention that is not causal"
    if model.get_output_embeddings() is None:
        return "it has no language-model head (load it with AutoModelForCausalLM)"
    other_types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other_types:
        return f"it has layers of the types {sorted(other_types)}, and only attention over single tokens is supported"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"its last {config.num_kv_shared_layers} layers share the KV of others"
    if getattr(config, "kv_lora_rank", None):
        return "its KV cache holds compressed latents (MLA)"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is not causal"
    if "dynamic" in _rope_types(config):
        return (
            "with dynamic NTK scaling, transformers computes keys by the longest prompt that it has seen so far, so "
            "keys of two prompts do not fit together"
        )
    if not model._supports_attention_backend:
        return "its attention does not go through transformers' attention interface"
    return None


def _rope_types(config: Any) -> set[str]:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parameters = [given, *(value for value in given.values() if isinstance(value, dict))]
    return {str(p.get("rope_type") or p.get("type")) for p in parameters}
