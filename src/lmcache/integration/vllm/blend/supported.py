"""Which models, served how, can be blended, as far as their modules tell. What only a run tells is in ``trial``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.vllm.blend import fp8_layers
from lmcache.integration.vllm.blend.scoring import Scoring

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_served(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Look at how the model is served.

    Raises:
        UnsupportedModelError: a forward of ours would not fit in with the forwards of vLLM.
    """
    parallel = vllm_config.parallel_config
    reason = None
    if vllm_config.model_config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif vllm_config.lora_config is not None:
        reason = "LoRA is on, and vLLM sets the adapter of each row for its own forward only"
    elif parallel.pipeline_parallel_size > 1:
        reason = "under pipeline parallelism no rank has all layers"
    elif parallel.data_parallel_size > 1 and parallel.is_moe_model is not False:
        reason = "its experts are shared by data-parallel ranks, which must all run each forward"
    elif max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        reason = "under context parallelism no rank has all tokens"
    if reason is not None:
        raise UnsupportedModelError(model, reason)


def attention_layers(model: nn.Module, vllm_config: VllmConfig) -> dict[str, Any]:
    """The attention layers of ``model``, by vLLM's names, in order.

    Layers of other models in the same process (a draft model's) are left out.

    Raises:
        UnsupportedModelError: there are layers that do more than attention over the K and V of single tokens, or other
            than what the blend computes.
    """
    parts = {id(part) for part in model.modules()}
    layers = {
        name: layer
        for name, layer in vllm_config.compilation_config.static_forward_context.items()
        if isinstance(layer, AttentionLayerBase) and id(layer) in parts
    }
    if not layers:
        raise UnsupportedModelError(model, "it has no attention layers that vLLM knows of")
    for name, layer in layers.items():
        if (reason := _reason_against(layer)) is not None:
            raise UnsupportedModelError(model, f"{name} {reason}")
    return layers


def _reason_against(layer: Any) -> str | None:
    if type(layer) is not Attention:  # its subclasses are there to see other keys
        return f"is of type {type(layer).__name__}; only plain attention over the K and V of single tokens is supported"
    if layer.attn_type != AttentionType.DECODER:
        return "is not causal"
    if layer.kv_sharing_target_layer_name is not None:
        return f"uses the KV of {layer.kv_sharing_target_layer_name}"
    if layer.kv_cache_torch_dtype != layer.dtype and (reason := fp8_layers.reason_against(layer)) is not None:
        return reason
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        return "adds ALiBi to its scores"
    if getattr(layer.impl, "chunk_lookback", -1) > -1:
        return "sees its keys by chunks"
    window = Scoring.of(layer.impl).sliding_window
    if window != layer.sliding_window:
        return f"has a sliding window of {layer.sliding_window}, its backend {type(layer.impl).__name__} of {window}"
    return None
