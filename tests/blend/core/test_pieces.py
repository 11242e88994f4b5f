"""A blend in forwards of bounded size, whose layers are handed over, against the same blend in one go."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.blend.batch import BlendPrompt
from lmcache.blend.blend_pass import BlendResult, blend
from lmcache.blend.correctors.kriging import KrigingCorrector
from lmcache.blend.host import Attend
from lmcache.blend.kv_source import KVLoadError
from lmcache.blend.pieces import cut_rows
from lmcache.blend.plan import BlendPlan, ReusedSpan
from lmcache.blend.policies.interface import SelectionPolicy
from tests.blend.core.test_blend import (
    MODEL,
    ROPES,
    AsItIs,
    Asking,
    Chosen,
    Everything,
    Gradual,
    blends,
    ids_of,
)
from tests.blend.core.tiny_model import LAYERS, LayerKVPair, Stored, TinyHost


class CountingHost(TinyHost):
    """Remembers how many rows each forward had."""

    def __init__(self, prompts: Sequence[torch.Tensor]) -> None:
        super().__init__(MODEL, prompts)
        self.rows: list[int] = []

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, attend: Attend) -> object:
        self.rows.append(len(rows))
        return super().forward(rows, positions, attend)


def in_pieces(
    prompts: Sequence[torch.Tensor], planned: Sequence[BlendPrompt], policy: SelectionPolicy, max_rows: int
) -> tuple[BlendResult[object], CountingHost]:
    host = CountingHost(prompts)
    return blend(host, planned, ROPES, policy, AsItIs(), max_rows=max_rows), host


@settings(max_examples=40)
@given(blends(seed=1), blends(seed=2), st.integers(1, 12), st.sampled_from([Everything, Gradual, Asking]))
def test_pieces_give_what_one_forward_gives(first, second, max_rows, policy):
    prompts, planned = [first[0], second[0]], [first[1], second[1]]
    whole = blend(TinyHost(MODEL, prompts), planned, ROPES, policy(), AsItIs())
    pieces, host = in_pieces(prompts, planned, policy(), max_rows)
    assert pieces.plans == whole.plans
    for name in ("keys", "values"):
        for layer in range(LAYERS):
            torch.testing.assert_close(getattr(pieces, name)[layer], getattr(whole, name)[layer], rtol=1e-7, atol=1e-7)
    assert max(host.rows) <= max_rows


@given(st.lists(st.integers(0, 500), max_size=60, unique=True), st.lists(st.integers(0, 500), max_size=8), st.data())
def test_rows_are_cut_into_pieces_without_gap_at_edges_where_that_costs_little(rows, edges, data):
    rows, limit = sorted(rows), data.draw(st.integers(1, 40))
    cuts = list(cut_rows(torch.tensor(rows, dtype=torch.int64), sorted(edges), limit))
    assert [start for start, _ in cuts] == [0, *(end for _, end in cuts[:-1])]
    assert cuts[-1][1] == len(rows)
    assert all(end - start <= limit for start, end in cuts)
    assert all(2 * (end - start) >= limit for start, end in cuts[:-1])


def passage(length: int, ratio: float) -> tuple[torch.Tensor, BlendPrompt]:
    ids = ids_of(length + 3)
    source = Stored(MODEL.prefill(ids[:length], start=40)[1])
    return ids, BlendPrompt(BlendPlan.of(length + 3, [ReusedSpan(0, length, 0, 0, 40)]), [source], ratio)


def test_a_passage_that_a_piece_cuts_is_corrected_on_both_sides() -> None:
    """Each kept token once, by the fresh tokens of its own side."""
    ids, planned = passage(30, 0.0)
    chosen = Chosen(range(0, 30, 3))
    before = blend(TinyHost(MODEL, [ids]), [planned], ROPES, chosen, AsItIs(), max_rows=7)
    after = blend(TinyHost(MODEL, [ids]), [planned], ROPES, chosen, KrigingCorrector(), max_rows=7)
    kept = [row for row in range(30) if row % 3]
    assert (after.keys[1][kept] != before.keys[1][kept]).flatten(1).any(1).all()
    assert torch.equal(after.keys[0][::3][:10], before.keys[0][::3][:10])


def test_each_layer_is_handed_over_once_in_order_and_not_kept() -> None:
    ids, planned = passage(20, 0.5)
    kept = blend(TinyHost(MODEL, [ids]), [planned], ROPES, Gradual(), AsItIs())
    for max_rows in (None, 6):
        seen: list[tuple[int, LayerKVPair]] = []
        result = blend(
            TinyHost(MODEL, [ids]),
            [planned],
            ROPES,
            Gradual(),
            AsItIs(),
            max_rows=max_rows,
            on_layer=lambda layer, k, v, seen=seen: seen.append((layer, LayerKVPair(k.clone(), v.clone()))),
        )
        assert [layer for layer, _ in seen] == list(range(LAYERS))
        assert (result.keys, result.values) == ([], [])
        assert result.charged_budgets == kept.charged_budgets
        for layer, pair in seen:
            torch.testing.assert_close(pair.k, kept.keys[layer], rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(pair.v, kept.values[layer], rtol=1e-7, atol=1e-7)


def test_after_a_load_that_fails_in_the_middle_all_layers_are_handed_over_again() -> None:
    class Failing:
        num_tokens = length = 20

        def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
            if layer_id == 2:
                raise KVLoadError("gone")
            return source.layer(layer_id)

    ids, planned = passage(20, 0.0)
    (source,) = planned.sources
    seen: list[int] = []
    result = blend(
        TinyHost(MODEL, [ids]),
        [BlendPrompt(planned.plan, [Failing()], 0.0)],
        ROPES,
        Chosen(),
        AsItIs(),
        on_layer=lambda layer, k, v: seen.append(layer),
    )
    assert seen == [0, 1, 0, 1, 2, 3]
    assert result.fallbacks == ("gone",)


def test_the_next_layer_is_fetched_while_one_is_used() -> None:
    calls: list[str] = []

    class Fetching:
        num_tokens = length = 20

        def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append(f"use {layer_id}")
            return source.layer(layer_id)

        def prefetch(self, layer_id: int) -> None:
            calls.append(f"fetch {layer_id}")

    ids, planned = passage(20, 0.0)
    (source,) = planned.sources
    blend(TinyHost(MODEL, [ids]), [BlendPrompt(planned.plan, [Fetching()], 0.0)], ROPES, Chosen(), AsItIs())
    assert calls == ["use 0", "fetch 1", "use 1", "fetch 2", "use 2", "fetch 3", "use 3"]


def test_a_forward_of_no_rows_is_refused() -> None:
    ids, planned = passage(5, 0.0)
    with pytest.raises(ValueError, match="max_rows=0"):
        blend(TinyHost(MODEL, [ids]), [planned], ROPES, Chosen(), AsItIs(), max_rows=0)
