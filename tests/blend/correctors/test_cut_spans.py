"""Passages are cut into pieces whose cost is bounded."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.blend.correctors.sampled_span import PieceLimits, cut_spans


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    limits=st.sampled_from([None, PieceLimits(1, 1), PieceLimits(7, 3), PieceLimits(32, 5)]),
    data=st.data(),
)
def test_every_recomputed_token_of_a_passage_is_in_one_piece(
    lengths: list[int], limits: PieceLimits | None, data: st.DataObject
) -> None:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    total = ends[-1]
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, total - 1)))), dtype=torch.int64)
    seen: list[int] = []
    for start, end, first, last in cut_spans(spans, rows, limits):
        own = rows[first:last].tolist()
        assert own
        assert start <= own[0] <= own[-1] < end
        assert any(begin <= start < end <= stop for begin, stop in spans), "no piece reaches over an end"
        if limits is not None:
            assert end - start <= limits.tokens
            assert len(own) <= limits.fresh
        seen += own
    assert seen == rows.tolist()
