"""What a blend gives back for one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from lmcache.blend.plan import BlendPlan
from lmcache.integration.transformers.kv_cache import generation_cache


@dataclass(frozen=True)
class BlendReport:
    """``charged_budget``: the share of (reused token, layer) pairs whose QKV was computed afresh. ``seconds`` by phase,
    of the whole pass. ``fallback``: why the prompt was computed whole, None where it was blended."""

    charged_budget: float
    seconds: dict[str, float]
    fallback: str | None


@dataclass(frozen=True, eq=False)
class BlendedPrompt:
    """A prompt that is ready to be answered.

    Attributes:
        input_ids: int64 ``[1, N]``, the whole prompt.
        logits: ``[vocab]``, of the last token.
        keys: ``[N, kv_heads, dim]`` a layer; ``values`` likewise.
        plan: what was reused from where, what was computed, and why.
    """

    input_ids: torch.Tensor
    logits: torch.Tensor
    keys: Sequence[torch.Tensor] = field(repr=False)
    values: Sequence[torch.Tensor] = field(repr=False)
    plan: BlendPlan
    report: BlendReport
    config: Any = field(repr=False)

    @property
    def past_key_values(self) -> DynamicCache:
        """A new transformers cache of the first ``N - 1`` tokens. ``generate`` computes the last one, and writes to it:
        so each generation takes one of its own."""
        return generation_cache(self.config, self.keys, self.values)

    def generate_inputs(self) -> dict[str, Any]:
        """Keyword arguments with which ``model.generate`` goes on."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids),
            "past_key_values": self.past_key_values,
        }
