"""Layers to correct: random KV, spans, and recomputed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st

from lmcache.blend.correctors.interface import LayerCorrection

KV_HEADS, KEY_DIM, VALUE_DIM = 2, 8, 6


@dataclass(frozen=True)
class Prompt:
    """``spans`` are half-open row ranges of its ``num_rows`` rows; ``fresh`` are recomputed rows, ascending."""

    num_rows: int
    spans: tuple[tuple[int, int], ...]
    fresh: tuple[int, ...]
    seed: int = 0


def layer_of(*prompts: Prompt, dtype: torch.dtype = torch.float32) -> LayerCorrection:
    """One layer of a batch. A prompt has the same KV in every batch."""
    drawn = [_draw(prompt, dtype) for prompt in prompts]
    starts = [sum(prompt.num_rows for prompt in prompts[:index]) for index in range(len(prompts))]
    keys, values, fresh_keys, fresh_values = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return LayerCorrection(
        layer_id=3,
        keys=keys,
        values=values,
        rows=torch.tensor(
            [start + row for start, prompt in zip(starts, prompts, strict=True) for row in prompt.fresh],
            dtype=torch.int64,
        ),
        fresh_keys=fresh_keys,
        fresh_values=fresh_values,
        spans=tuple(
            (start + a, start + b) for start, prompt in zip(starts, prompts, strict=True) for a, b in prompt.spans
        ),
        positions=torch.cat([torch.arange(prompt.num_rows) for prompt in prompts]),
        rope=None,
    )


def _draw(prompt: Prompt, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    generator = torch.Generator().manual_seed(prompt.seed)
    shapes = [
        (prompt.num_rows, KV_HEADS, KEY_DIM),
        (prompt.num_rows, KV_HEADS, VALUE_DIM),
        (len(prompt.fresh), KV_HEADS, KEY_DIM),
        (len(prompt.fresh), KV_HEADS, VALUE_DIM),
    ]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    num_rows = draw(st.integers(1, 40))
    cuts = sorted(draw(st.sets(st.integers(0, num_rows), max_size=8)))
    spans = [span for span in pairwise(cuts) if draw(st.booleans())]
    fresh = sorted(draw(st.sets(st.integers(0, num_rows - 1), max_size=12)))
    return Prompt(num_rows, tuple(spans), tuple(fresh), draw(st.integers(0, 3)))


def batches() -> st.SearchStrategy[list[Prompt]]:
    return st.lists(prompts(), min_size=1, max_size=3)
