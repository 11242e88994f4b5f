"""What a selection policy sees of a batch, and the one way in which scores become tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from lmcache.blend.top_rows import top_rows

HeadReduction = Literal["mean", "max"]
DeviationTensor = Literal["k", "v", "kv"]


class Probe(Protocol):
    """Looks into the model for a policy. Each call runs (part of) a forward; what that costs is charged."""

    def attention_received(
        self, *, span: int, layers: Sequence[int] | None, heads: HeadReduction, computed: torch.Tensor | None
    ) -> torch.Tensor:
        """See :meth:`SelectionContext.attention_received`."""

    def deviation(self, layer: int, tensor: DeviationTensor, rows: torch.Tensor | None) -> torch.Tensor:
        """See :meth:`SelectionContext.deviation`."""


@dataclass(frozen=True)
class SelectionContext:
    """A batch of prompts, its rows one after the other (``N`` in all).

    ``prompts`` and ``spans`` are half-open row ranges; a span is one reused passage that was moved (exact prefixes are
    none). ``reusable`` (bool ``[N]``) marks the rows of all spans, R; ``forced`` (bool ``[N]``) the rows that must be
    computed whatever the policy says, S; ``exact`` rows are in neither. ``ratios`` is one recompute ratio a prompt.
    """

    num_layers: int
    prompts: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]
    reusable: torch.Tensor
    forced: torch.Tensor
    ratios: tuple[float, ...]
    probe: Probe
    seed: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.reusable)

    def attention_received(
        self,
        *,
        span: int,
        layers: Sequence[int] | None = None,
        heads: HeadReduction = "mean",
        computed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention that each row gets from the forced ones among the last ``span`` of its prompt, float32 ``[N]``.

        Averaged over these queries and over ``layers`` (None: all), and over heads or maximised over them. The queries
        look at the moved, uncorrected KV. The idea is ProphetKV's.

        ``computed`` (bool ``[N]``): rows that are chosen whatever the scores will be. Where the forward computes all
        new rows anyway, it computes these for good and has the others corrected by them; the queries look at corrected
        KV then. They must be among what is selected in the end.
        """
        return self.probe.attention_received(span=span, layers=layers, heads=heads, computed=computed)

    def deviation(self, layer: int, tensor: DeviationTensor = "v", rows: torch.Tensor | None = None) -> torch.Tensor:
        """How far fresh K or V of a layer is from the moved one: sum of squares over heads and dims, float32 ``[N]``.

        The deviation of CacheBlend (arXiv:2405.16444). "kv" is the sum of both, each divided by its mean.
        Runs the model on ``rows`` (bool ``[N]``; None: all rows) up to ``layer``; rows outside get −inf.
        """
        return self.probe.deviation(layer, tensor, rows)

    def choose(
        self,
        scores: torch.Tensor,
        *,
        ratios: Sequence[float] | None = None,
        already: torch.Tensor | None = None,
        within: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The forced rows and, in each prompt, the ``round(ratio · |R|)`` reusable ones with the best scores.

        Ties go to the earlier row.

        Args:
            scores: ``[N]``, higher is better.
            ratios: one a prompt, in place of the context's.
            already: bool ``[N]``, rows chosen before: they stay, and count towards the number.
            within: bool ``[N]``, the only rows to choose from.

        Returns:
            bool ``[N]``.
        """
        chosen = self.forced.clone()
        if already is not None:
            chosen |= already
        eligible = self.reusable & ~chosen if within is None else self.reusable & ~chosen & within
        for (start, end), ratio in zip(self.prompts, ratios or self.ratios, strict=True):
            rows = slice(start, end)
            spent = int((chosen & self.reusable & ~self.forced)[rows].sum())
            count = self.budget(int(self.reusable[rows].sum()), ratio) - spent
            if count > 0:
                chosen[start + top_rows(scores[rows], count, eligible[rows])] = True
        return chosen

    @staticmethod
    def budget(reusable: int, ratio: float) -> int:
        """How many of ``reusable`` tokens a ratio stands for: rounded, halves up."""
        return int(reusable * ratio + 0.5)
