"""How an attention layer turns q·k into weights, as the backend that vLLM chose for it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Scoring:
    """Keyword arguments of :class:`lmcache.blend.host.Attend`."""

    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    @classmethod
    def of(cls, impl: Any) -> Scoring:
        """Read it from ``Attention.impl``. Not to be kept: weights that are loaded again bring their own sinks."""
        return cls(
            scale=float(impl.scale),
            sliding_window=_window(getattr(impl, "sliding_window", None)),
            softcap=getattr(impl, "logits_soft_cap", None) or None,  # some say 0 for none
            sinks=getattr(impl, "sinks", None),
        )


def _window(said: int | tuple[int, int] | None) -> int | None:
    """Tokens that a query sees, itself included. FlashAttention counts without itself; −1 is no window."""
    tokens = -1 if said is None else said if isinstance(said, int) else said[0] + 1
    return tokens if tokens > 0 else None
