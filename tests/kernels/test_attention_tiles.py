"""How keys are cut for programs that run side by side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.kernels import attention_tiles
from lmcache.kernels.attention_tiles import blocks_of_a_part, blocks_seen, padded_dim, tile, tiles

GPU = torch.device("cuda", 0)  # need not be there
AT_ONCE = 264
TILE = 64, 64, 4, 3


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "_at_once", lambda *_: AT_ONCE)
    blocks_of_a_part.cache_clear()


def test_a_tile_sees_what_its_last_query_sees() -> None:
    positions = torch.tensor([0, 63, 64, 1000, 1001])
    assert blocks_seen(5, 16, 4096, TILE, positions) == (16, 16)  # four queries a tile
    assert blocks_seen(5, 64, 4096, TILE, positions) == (1, 1, 2, 16, 16)
    assert blocks_seen(5, 48, 4096, TILE, positions) == (1, 2, 16, 16), "a query may lie in two tiles"


def test_a_window_hides_what_lies_before_it() -> None:
    positions = torch.tensor([10, 63, 64, 1000, 1001])
    assert blocks_seen(5, 64, 4096, TILE, positions, 100) == (1, 1, 2, 2, 2)
    assert blocks_seen(5, 16, 4096, TILE, positions, 100) == (16, 2), "from what the first of four queries sees"


def test_queries_of_unknown_places_lie_evenly() -> None:
    assert blocks_seen(4, 64, 1024, TILE) == (4, 8, 12, 16)
    assert blocks_seen(3, 64, 64, TILE) == (1, 1, 1)


@pytest.mark.parametrize(
    ("queries", "keys", "expected"), [(136, 4176, 14), (239, 8272, 44), (1263, 16464, 86)], ids=["4k", "8k", "16k"]
)
def test_what_was_fastest_on_a_gpu_is_chosen(queries: int, keys: int, expected: int) -> None:
    """An even sample of a prompt, and a question of 32 tokens at its end."""
    sample = torch.linspace(20, keys - 40, queries - 32).long()
    positions = torch.cat([sample, torch.arange(keys - 32, keys)]).unique()
    seen = blocks_seen(len(positions), 4, keys, TILE, positions)
    assert blocks_of_a_part(seen, 8, len(positions) * 32 * 128 * 4, 128, GPU) == expected


@given(st.lists(st.integers(1, 600), min_size=1, max_size=200), st.integers(1, 64), st.integers(1, 1 << 28))
def test_parts_are_few_and_cover_all(seen: list[int], kv_heads: int, part_bytes: int) -> None:
    each = blocks_of_a_part(tuple(seen), kv_heads, part_bytes, 128, GPU)
    parts = -(-max(seen) // each)
    assert 1 <= each <= max(seen)
    assert parts == 1 or parts <= 16
    assert parts == 1 or parts * part_bytes <= 64 << 20


def test_few_queries_take_small_tiles() -> None:
    q = torch.empty(0, dtype=torch.bfloat16)
    few, many = tiles(128, q.dtype)
    assert tile(32, 8, 128, q) == few
    assert tile(1 << 20, 8, 128, q) == many
    assert tile(1 << 20, 8, 128, q, is_band=True) == few, "a band is few keys"
    assert tile(1 << 20, 8, 256, q) in tiles(256, q.dtype)


def test_heads_are_padded_to_a_power_of_two() -> None:
    assert [padded_dim(*dims) for dims in ((1, 1), (48, 80), (128, 128), (96, 129))] == [16, 128, 128, 256]
