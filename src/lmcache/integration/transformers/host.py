"""A transformers model as the host of a blend."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from lmcache.blend.host import Attend
from lmcache.integration.transformers.attention_function import AttentionSwitch


class TransformersModel:
    """What a host needs of a model, found once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.num_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.switch = AttentionSwitch(model)
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def logits(
        self, input_ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """``[len(wanted), vocab]``: run ``input_ids`` ``[n]`` at ``positions`` ``[n]``; logits of the rows ``wanted``.

        Raises:
            ValueError: the model is in training mode.
        """
        if self.model.training:
            raise ValueError("the model is in training mode, where dropout makes KV random: call model.eval()")
        device = self.model.get_input_embeddings().weight.device
        wanted = wanted.to(device)
        with self.switch.calling(attend):
            output = self.model(
                input_ids=input_ids[None].to(device),
                position_ids=positions[None].to(device),
                use_cache=False,
                return_dict=True,
                **({"logits_to_keep": wanted} if self.keeps_logits else {}),
            )
        logits: torch.Tensor = output.logits[0]
        return logits if self.keeps_logits else logits[wanted.to(logits.device)]


class TransformersHost:
    """A :class:`lmcache.blend.host.BlendHost` over a batch of prompts, laid one after the other in batch row 0.

    Args:
        prompts: int64 ``[N_i]`` each, on the CPU.

    A forward gives the logits ``[prompts, vocab]`` of each prompt whose last row it was asked for.
    """

    def __init__(self, model: TransformersModel, prompts: Sequence[torch.Tensor]) -> None:
        self._model = model
        self._ids = torch.cat(list(prompts))
        self._last_rows = torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1

    @property
    def num_layers(self) -> int:
        return self._model.num_layers

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """See :class:`lmcache.blend.host.BlendHost`."""
        wanted = torch.nonzero(torch.isin(rows, self._last_rows))[:, 0]
        return self._model.logits(self._ids[rows], positions, wanted, attend)
