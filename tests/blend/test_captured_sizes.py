"""Which of the forwards that are captured as CUDA graphs are kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache.blend.captured_model import worth_keeping


@given(st.dictionaries(st.integers(1, 4096), st.floats(0.01, 10.0), min_size=1))
def test_the_next_larger_size_that_is_kept_is_the_fastest_with_enough_rows(milliseconds: dict[int, float]) -> None:
    kept = worth_keeping(milliseconds)
    assert kept == sorted(kept)
    for rows in range(1, max(milliseconds) + 1):
        chosen = next(size for size in kept if size >= rows)
        assert milliseconds[chosen] == min(took for size, took in milliseconds.items() if size >= rows)


def test_a_size_for_which_a_slow_kernel_was_chosen_is_passed_over() -> None:
    """What an H200 took for the linear layers of one layer of Llama-3.1-8B."""
    measured = {224: 0.193, 256: 0.188, 416: 0.325, 448: 0.437, 480: 0.350, 512: 0.331, 544: 0.393}
    assert worth_keeping(measured) == [256, 416, 512, 544]
