"""Batches as a policy sees them, and a probe with scores that are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from hypothesis import strategies as st

from lmcache.blend.selection import DeviationTensor, HeadReduction, SelectionContext

Kind = Literal["exact", "moved", "new"]


@dataclass(frozen=True)
class Prompt:
    """``parts`` are lengths and fates, in order; the last ``suffix`` rows are forced whatever they are."""

    parts: tuple[tuple[Kind, int], ...]
    suffix: int = 1
    ratio: float = 0.5

    @property
    def num_rows(self) -> int:
        return sum(length for _, length in self.parts)


@dataclass
class FakeProbe:
    """``attention`` and ``deviations[layer]`` are ``[N]``. Remembers what it was asked for."""

    attention: torch.Tensor
    deviations: dict[int, torch.Tensor]
    asked: list[dict[str, object]] = field(default_factory=list)
    looked_at: list[torch.Tensor] = field(default_factory=list)
    computed: list[torch.Tensor] = field(default_factory=list)

    def attention_received(
        self, *, span: int, layers: Sequence[int] | None, heads: HeadReduction, computed: torch.Tensor | None
    ) -> torch.Tensor:
        self.asked.append({"span": span, "layers": layers if layers is None else list(layers), "heads": heads})
        if computed is not None:
            self.computed.append(computed.clone())
        return self.attention.clone()

    def deviation(self, layer: int, tensor: DeviationTensor, rows: torch.Tensor | None) -> torch.Tensor:
        self.asked.append({"layer": layer, "tensor": tensor})
        rows = torch.ones_like(self.attention, dtype=torch.bool) if rows is None else rows.clone()
        self.looked_at.append(rows)
        return self.deviations[layer].where(rows, -torch.inf)


def context_of(*prompts: Prompt, num_layers: int = 10, seed: int = 0, scores: int = 0) -> SelectionContext:
    """A batch. ``scores`` seeds what the probe says; a prompt gets the same scores in every batch."""
    reusable, forced, attention = [], [], []
    deviations: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
    ranges, spans, start = [], [], 0
    for prompt in prompts:
        generator = torch.Generator().manual_seed(scores)
        end = start + prompt.num_rows
        kinds = [kind for kind, length in prompt.parts for _ in range(length)]
        at = start
        for kind, length in prompt.parts:
            if kind == "moved":
                spans.append((at, at + length))
            at += length
        suffix = [row >= len(kinds) - prompt.suffix for row in range(len(kinds))]
        reusable += [kind == "moved" for kind in kinds]
        forced += [kind == "new" or last for kind, last in zip(kinds, suffix, strict=True)]
        attention.append(torch.rand(len(kinds), generator=generator))
        for layer in deviations:
            layer.append(torch.rand(len(kinds), generator=generator))
        ranges.append((start, end))
        start = end
    return SelectionContext(
        num_layers=num_layers,
        prompts=tuple(ranges),
        spans=tuple(spans),
        reusable=torch.tensor(reusable, dtype=torch.bool),
        forced=torch.tensor(forced, dtype=torch.bool),
        ratios=tuple(prompt.ratio for prompt in prompts),
        probe=FakeProbe(torch.cat(attention), {index: torch.cat(layer) for index, layer in enumerate(deviations)}),
        seed=seed,
    )


def probe_of(context: SelectionContext) -> FakeProbe:
    assert isinstance(context.probe, FakeProbe)
    return context.probe


def chosen_rows(context: SelectionContext, computed: torch.Tensor) -> list[int]:
    """What was chosen beyond the forced rows."""
    return torch.nonzero(computed & ~context.forced)[:, 0].tolist()


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    lengths = st.integers(1, 12)
    parts: list[tuple[Kind, int]] = [("exact", draw(lengths))] if draw(st.booleans()) else []
    parts += draw(st.lists(st.tuples(st.sampled_from(("moved", "moved", "new")), lengths), max_size=5))
    if not parts:
        parts = [("new", draw(lengths))]
    total = sum(length for _, length in parts)
    ratio = draw(st.one_of(st.sampled_from((0.0, 0.15, 1.0)), st.floats(0, 1)))
    return Prompt(tuple(parts), draw(st.integers(1, min(total, 4))), ratio)


def batches() -> st.SearchStrategy[list[Prompt]]:
    return st.lists(prompts(), min_size=1, max_size=3)
