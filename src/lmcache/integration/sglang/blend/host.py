"""A model that SGLang has loaded as the host of a blend.

SGLang's attention layers ask the current ForwardContext for their backend, so a forward in a context of ours is
SGLang's own model with our attention. Nothing of SGLang is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from torch import nn

from lmcache.blend.host import Attend, StopForward
from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.sglang.tp_agreement import all_reduce


class SGLangModel:
    """What a host needs of a model, found once; an :class:`lmcache.integration.blend.model.EngineModel`.

    Raises:
        UnsupportedModelError: it cannot be blended.
    """

    def __init__(self, model_runner: Any) -> None:
        self.model: nn.Module = model_runner.model
        self._runner = model_runner
        self._device = torch.device(model_runner.device)
        found = {name: part for name, part in self.model.named_modules() if isinstance(part, RadixAttention)}
        self.layers = dict(sorted(found.items(), key=lambda item: int(item[1].layer_id)))
        for name, layer in self.layers.items():
            if (reason := _reason_against(layer)) is not None:
                raise UnsupportedModelError(self.model, f"{name} {reason}")
        if [int(layer.layer_id) for layer in self.layers.values()] != list(range(len(self.layers))):
            raise UnsupportedModelError(self.model, "not all of its layers are plain attention")

    @property
    def vocab_size(self) -> int:
        return int(self._runner.model_config.vocab_size)

    @property
    def max_positions(self) -> int:
        return int(self._runner.model_config.context_len)

    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> None:
        """Run the model up to its last attention on ``input_ids`` ``[n]`` at ``positions`` ``[n]``.

        What SGLang may write into its pools meanwhile goes to slot 0, which is there for padding.
        """
        batch = self._batch(input_ids.to(self._device, torch.int64), positions.to(self._device, torch.int64))
        backend = _Backend(attend, len(self.layers), self._runner)
        context = ForwardContext(attn_backend=backend)
        with torch.inference_mode(), forward_context(context), suppress(_LastLayerDone):
            self.model.forward(batch.input_ids, batch.positions, batch)

    def _batch(self, input_ids: torch.Tensor, positions: torch.Tensor) -> ForwardBatch:
        count = len(input_ids)
        lengths = torch.tensor([count], device=self._device)
        batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=1,
            input_ids=input_ids,
            req_pool_indices=torch.zeros(1, dtype=torch.int64, device=self._device),
            seq_lens=lengths,
            out_cache_loc=torch.zeros(count, dtype=torch.int64, device=self._device),
            seq_lens_sum=count,
        )
        batch.positions = positions
        batch.extend_num_tokens = count
        batch.extend_seq_lens = lengths
        batch.extend_prefix_lens = torch.zeros_like(lengths)
        return batch


class _LastLayerDone(Exception):
    """Nobody wants what a model computes behind its last attention."""


class _Backend(AttentionBackend):
    """Passes the attention of each layer on to ``attend``."""

    def __init__(self, attend: Attend, num_layers: int, model_runner: Any) -> None:
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self._attend = attend
        self._last_layer = num_layers - 1

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        pass

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``q`` and the output are ``[n, heads · dim]``."""
        window = layer.sliding_window_size
        attended = self._attend(
            int(layer.layer_id),
            q.view(len(q), layer.tp_q_head_num, layer.head_dim),
            k.view(len(q), layer.tp_k_head_num, layer.head_dim),
            v.view(len(q), layer.tp_v_head_num, layer.v_head_dim),
            scale=float(layer.scaling),
            # SGLang counts the keys before the query, and −1 is no window.
            sliding_window=window + 1 if window is not None and window >= 0 else None,
            softcap=float(layer.logit_cap) or None,
            sinks=kwargs.get("sinks"),
        )
        if layer.layer_id == self._last_layer:
            raise _LastLayerDone
        return attended.flatten(1)


class SGLangHost:
    """A :class:`lmcache.blend.host.BlendHost` that gives KV only: no forward comes to an end.

    Args:
        prompts: int64 ``[N_i]`` each, on the CPU.
    """

    def __init__(self, model: SGLangModel, prompts: Sequence[torch.Tensor], groups: Sequence[Any]) -> None:
        """``groups``: of the ranks that hold the other heads; see :func:`all_reduce`."""
        self._model = model
        self._groups = groups
        self._ids = torch.cat(list(prompts))

    @property
    def num_layers(self) -> int:
        return len(self._model.layers)

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, attend: Attend) -> None:
        """See :class:`lmcache.blend.host.BlendHost`."""
        self._model.run(self._ids[rows], positions, attend)
        raise StopForward

    def agreed_scores(self, scores: torch.Tensor, heads: Literal["mean", "max"]) -> torch.Tensor:
        """See :class:`lmcache.blend.host.ShardedHost`."""
        op = torch.distributed.ReduceOp.MAX if heads == "max" else torch.distributed.ReduceOp.SUM
        all_reduce(scores, op, self._groups)
        return scores


def _reason_against(layer: Any) -> str | None:
    if type(layer) is not RadixAttention:
        return f"is of type {type(layer).__name__}; only plain attention over the K and V of single tokens is supported"
    if layer.is_cross_attention or getattr(layer.attn_type, "value", "decoder") != "decoder":
        return "is not causal"
    if layer.qk_head_dim != layer.head_dim or layer.tp_k_head_num != layer.tp_v_head_num:
        return "keeps K and V of different shapes"
    if getattr(layer, "xai_temperature_len", -1) > 0 or getattr(layer, "pos_encoding_mode", "NONE") != "NONE":
        return "changes its scores by position"
    if layer.logit_cap and getattr(layer, "logit_capping_method", "tanh") != "tanh":
        return f"caps its scores by {layer.logit_capping_method}"
    return None
