"""A model that vLLM has loaded as the host of a blend.

vLLM's attention op looks its layer up by name in the current ForwardContext, so a forward in a context of ours, with
stand-ins under the names of the attention layers, is vLLM's own model with our attention. Nothing of vLLM is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context, override_forward_context, set_forward_context

from lmcache.blend.captured_model import SIZES, CapturedModel
from lmcache.blend.host import Attend, have_in_place
from lmcache.integration.vllm.blend.scoring import Scoring
from lmcache.integration.vllm.blend.supported import attention_layers, check_served
from lmcache.memory.to_device import to_device
from lmcache.observability.logging import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class VLLMModel:
    """What a host needs of a model, found once.

    Args:
        model: as :func:`lmcache.integration.vllm.blend.model_finder.find_model` gives it.

    Raises:
        UnsupportedModelError: it cannot be blended.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        check_served(model, vllm_config)
        self.model = model
        self.vllm_config = vllm_config
        self.layers = attention_layers(model, vllm_config)
        self._device = vllm_config.device_config.device
        self._captured: CapturedModel | None = None

    @property
    def vocab_size(self) -> int:
        return int(self.vllm_config.model_config.get_vocab_size())

    @property
    def max_positions(self) -> int:
        return int(self.vllm_config.model_config.max_model_len)

    @torch.inference_mode()
    def capture(self, max_rows: int) -> None:
        """From now on replay forwards of few rows as CUDA graphs, where that is possible."""
        sizes = [size for size in SIZES if size <= max_rows]
        if not sizes or get_tp_group().world_size > 1:  # collectives have rules of their own for captures
            return
        try:
            captured = CapturedModel(self._run, torch.device(self._device), sizes)
            captured.keep_fastest()
            self._captured = captured
        except Exception as error:
            logger.warning(
                "CacheBlend starts each kernel of the model by itself: CUDA graphs cannot be used: %s", error
            )

    @torch.inference_mode()
    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """``[n, hidden]``: what ``model.compute_logits`` takes, for ``input_ids`` ``[n]`` at ``positions`` ``[n]``.

        vLLM's pages are neither read nor written. At most ``max_num_batched_tokens`` rows: vLLM has sized its buffers
        by that. The next call may overwrite the outcome.
        """
        if self._captured is not None and len(input_ids) <= self._captured.max_rows:
            return self._captured.run(input_ids, positions, attend)
        return self._run(input_ids, positions, attend)

    def _run(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        with self._calling(attend, len(input_ids)):
            output = self.model(
                input_ids=self._sent(input_ids, torch.int32),  # the types of vLLM's own runners
                positions=self._sent(positions, torch.int64),
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        # A model whose hidden states a speculator reads gives those too.
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def _sent(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.to(dtype)
        return to_device(x, torch.device(self._device)) if x.device.type == "cpu" else x

    @contextmanager
    def _calling(self, attend: Attend, num_tokens: int) -> Iterator[None]:
        """Within it, the attention layers call ``attend``.

        The context is a new one, so that it counts our rows, and not those of the step that vLLM may be in. Not
        compiled: compiled code is for the number of rows, and for the attention, that vLLM has in mind.
        """
        stand_ins = {name: _StandIn(index, layer, attend) for index, (name, layer) in enumerate(self.layers.items())}
        with set_forward_context(None, self.vllm_config, num_tokens=num_tokens, slot_mapping={}, skip_compiled=True):
            context = get_forward_context()
            with override_forward_context(replace(context, no_compile_layers=context.no_compile_layers | stand_ins)):
                yield


class _StandIn:
    """Takes the place of an attention layer, and of its ``impl``, where vLLM's attention op looks for them."""

    def __init__(self, layer_id: int, layer: Any, attend: Attend) -> None:
        self.impl = self
        self.kv_cache = layer.kv_cache
        self._layer_id = layer_id
        self._layer = layer
        self._attend = attend

    def forward(
        self,
        _layer: object,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _kv_cache: object,
        _attn_metadata: None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``AttentionImpl.forward``: ``output`` ``[n, heads, dim]`` is filled."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attention that quantises its output cannot be blended")
        if query.dtype != key.dtype:
            # For an attention in fp8 of its own, vLLM has rounded it: it is as exact as vLLM's.
            query = (query.float() * self._layer._q_scale).to(key.dtype)
        scoring = Scoring.of(self._layer.impl)
        attended = self._attend(
            self._layer_id,
            query,
            key,
            value,
            scale=scoring.scale,
            sliding_window=scoring.sliding_window,
            softcap=scoring.softcap,
            sinks=scoring.sinks,
            out=output,
        )
        have_in_place(attended, output)
        return output


class VLLMHost:
    """A :class:`lmcache.blend.host.BlendHost` over a batch of prompts.

    Args:
        prompts: int64 ``[N_i]`` each, on the CPU.

    A forward gives the hidden states ``[prompts, hidden]`` of each prompt whose last row it was asked for. Under tensor
    parallelism a :class:`lmcache.blend.host.ShardedHost`: the model's own layers add up over the ranks.
    """

    def __init__(self, model: VLLMModel, prompts: Sequence[torch.Tensor]) -> None:
        self._model = model
        self._ids = torch.cat(list(prompts))
        self._last_rows = torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1

    @property
    def num_layers(self) -> int:
        return len(self._model.layers)

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """See :class:`lmcache.blend.host.BlendHost`."""
        hidden = self._model.run(self._ids[rows], positions, attend)
        return hidden[torch.isin(rows, self._last_rows).to(hidden.device)]

    def agreed_scores(self, scores: torch.Tensor, heads: Literal["mean", "max"]) -> torch.Tensor:
        """See :class:`lmcache.blend.host.ShardedHost`."""
        group = get_tp_group()
        if group.world_size > 1:
            op = dist.ReduceOp.MAX if heads == "max" else dist.ReduceOp.SUM
            dist.all_reduce(scores, op=op, group=group.cpu_group)
        return scores
