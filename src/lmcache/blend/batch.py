"""Several planned prompts as one row of tokens: what a forward and a policy see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from lmcache.blend.kv_source import KVSource
from lmcache.blend.plan import BlendPlan, ReusedSpan


@dataclass(frozen=True)
class BlendPrompt:
    """One prompt of a batch. ``plan.spans[i].source`` is an index into ``sources``.

    ``ratio``: the share of the reused tokens that the policy may choose to compute.
    """

    plan: BlendPlan
    sources: Sequence[KVSource] = ()
    ratio: float = 0.15

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: the recompute ratio must be 0 … 1")
        for span in self.plan.spans:
            if span.source >= len(self.sources):
                raise ValueError(f"{span}: there are only {len(self.sources)} sources")
            held = self.sources[span.source].num_tokens
            if span.source_start + span.end - span.start > held:
                raise ValueError(f"{span}: its source holds only {held} tokens")


@dataclass(frozen=True)
class PlacedSpan:
    """A reused span in the batch: ``rows`` is its half-open range of rows."""

    prompt: int
    rows: tuple[int, int]
    span: ReusedSpan
    source: KVSource


class BlendBatch:
    """``N`` rows. Masks are bool ``[N]``, ``positions`` is int64 ``[N]``; all on the CPU."""

    def __init__(self, prompts: Sequence[BlendPrompt]) -> None:
        if not prompts:
            raise ValueError("a blend needs at least one prompt")
        plans = [prompt.plan for prompt in prompts]
        ends = list(accumulate(plan.num_tokens for plan in plans))
        self.prompts = tuple(zip([0, *ends[:-1]], ends, strict=True))
        self.plans = tuple(plans)
        self.ratios = tuple(prompt.ratio for prompt in prompts)
        self.num_rows = ends[-1]
        self.positions = torch.cat([torch.arange(plan.num_tokens) for plan in plans])
        self.exact = self._joined(BlendPlan.exact)
        self.reusable = self._joined(BlendPlan.reusable)
        self.forced = self._joined(BlendPlan.forced)
        self.placed = tuple(
            PlacedSpan(index, (start + span.start, start + span.end), span, prompt.sources[span.source])
            for index, ((start, _), prompt) in enumerate(zip(self.prompts, prompts, strict=True))
            for span in prompt.plan.spans
        )
        self.edges = sorted(
            {edge for rows in (*self.prompts, *(placed.rows for placed in self.placed)) for edge in rows}
        )
        self.moved_spans = tuple(placed.rows for placed in self.placed if not placed.span.exact)

    def _joined(self, mask: Callable[[BlendPlan], torch.Tensor]) -> torch.Tensor:
        return torch.cat([mask(plan) for plan in self.plans])
