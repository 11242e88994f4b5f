"""How FlashAttention is told to cut keys; its outcome is checked against our kernel where it runs, on a GPU."""

from __future__ import annotations

import pytest

from lmcache.integration.vllm.blend.flash_attention import parts_of_keys

MULTIPROCESSORS = 132


@pytest.mark.parametrize(("runs", "parts"), [(5, 5), (8, 3), (14, 2)])
def test_few_programs_take_parts_that_fill_the_gpu(runs: int, parts: int) -> None:
    """The fastest ones of 136, 239 and 444 queries on an H200 with 8 KV heads."""
    assert parts_of_keys(runs * 8, MULTIPROCESSORS) == parts


@pytest.mark.parametrize("runs", [21, 39, 1000])
def test_many_programs_are_left_to_flash_attention(runs: int) -> None:
    assert parts_of_keys(runs * 8, MULTIPROCESSORS) == 0
