"""Where tokens lie in a plane, told without a division."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.paging.layout import KVLayout, Plane


@given(
    block_size=st.integers(1, 40),
    token=st.integers(1, 100),
    gap=st.integers(0, 500),
    slots=st.lists(st.integers(0, 200), min_size=1, max_size=20),
)
@pytest.mark.parametrize("blocks", [1, 300])
def test_a_token_lies_so_many_blocks_and_tokens_behind_the_first(
    blocks: int, block_size: int, token: int, gap: int, slots: list[int]
) -> None:
    slots = [slot % (blocks * block_size) for slot in slots]
    block = block_size * token + gap
    plane = Plane(0, (block, token, 1, 1))
    layout = KVLayout("made up", torch.float32, 1, blocks, block_size, 1, 1, (plane,), None)
    wanted = [slot // block_size * block + slot % block_size * token for slot in slots]
    given_slots = torch.tensor(slots)
    assert layout.token_offsets(given_slots, plane).tolist() == wanted
    assert given_slots.tolist() == slots
