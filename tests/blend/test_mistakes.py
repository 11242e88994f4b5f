"""The mistakes of :mod:`tests.blend_mistakes` can still be made: slow tests on real engines rest on it."""

from __future__ import annotations

import inspect

import torch

from lmcache.blend.attention import QueryMask
from lmcache.blend.rope import FusedRope
from tests.blend_mistakes import bottom_right, unrotated


def names(function: object) -> list[str]:
    assert callable(function)
    return [name for name, each in inspect.signature(function).parameters.items() if each.kind is not each.VAR_KEYWORD]


def test_mistakes_take_what_the_right_way_takes() -> None:
    assert names(bottom_right) == names(QueryMask.__init__)
    assert names(FusedRope.fused_encode)[:4] == names(unrotated)


def test_the_wrong_mask_shows_rows_other_keys() -> None:
    positions = torch.tensor([1, 5, 9])
    right, wrong = QueryMask(positions, on_host=positions), object.__new__(QueryMask)
    bottom_right(wrong, positions, None, None, on_host=positions)
    assert wrong.positions_on_host.tolist() == [7, 8, 9] != right.positions_on_host.tolist()
