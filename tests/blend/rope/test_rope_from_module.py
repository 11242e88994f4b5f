"""Frequencies read back from tables of cos and sin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.blend.rope import RopeFrequencies, UnsupportedRopeError
from lmcache.blend.rope_from_module import rope_from_module
from lmcache.blend.rope_scaling import (
    default_frequencies,
    linear_frequencies,
    llama3_frequencies,
    yarn_frequencies,
)

KINDS = {
    "default": default_frequencies(64, 1e4),
    "theta 1e7": default_frequencies(128, 1e7),
    "linear": linear_frequencies(64, 1e4, factor=8.0),
    "llama3": llama3_frequencies(
        64, 5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    "yarn": yarn_frequencies(64, 1e4, factor=40.0, original_max_position_embeddings=4096),
    "partly still": RopeFrequencies(torch.cat((default_frequencies(32, 1e4).inv_freq, torch.zeros(16)))),
}


def table(frequencies: RopeFrequencies, num_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """As the engines make it: angles in float32, then the table's type."""
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies.inv_freq.float()
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * frequencies.attention_scaling).to(dtype)


def module(cos_sin_cache: torch.Tensor, **attributes: Any) -> SimpleNamespace:
    attributes = {"head_size": 128, "is_neox_style": True, **attributes}
    return SimpleNamespace(cos_sin_cache=cos_sin_cache, **attributes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_positions", [3, 2048, 131_072, 1_000_000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_scaling_is_read_back(kind, num_positions, dtype):
    made_with = KINDS[kind] if num_positions < 1_000_000 else RopeFrequencies(KINDS[kind].inv_freq[:4])
    read = rope_from_module(module(table(made_with, num_positions, dtype))).frequencies()
    angle_error = (read.inv_freq - made_with.inv_freq).abs() * num_positions
    # A float32 angle of p radians is off by p · 2⁻²⁴, an entry of the table by half a unit in the last place; both
    # average out over the sampled rows.
    tolerance = 0.1 * num_positions * 2.0**-24 + (torch.finfo(dtype).eps if num_positions < 100 else 1e-3)
    assert angle_error.max() < tolerance
    assert read.attention_scaling == pytest.approx(made_with.attention_scaling, rel=torch.finfo(dtype).eps)


@given(
    inv_freq=st.lists(st.floats(1e-9, 1.5), min_size=1, max_size=8),
    scaling=st.floats(0.5, 2.0),
    num_positions=st.integers(64, 40_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_frequencies_are_read_back(inv_freq, scaling, num_positions, dtype):
    made_with = RopeFrequencies(torch.tensor(inv_freq), scaling)
    read = rope_from_module(module(table(made_with, num_positions, dtype))).frequencies()
    assert ((read.inv_freq - made_with.inv_freq).abs() * num_positions).max() < 4e-3


def test_what_else_the_module_says():
    small = table(KINDS["default"], 100, torch.float32)
    rope = rope_from_module(module(small, is_neox_style=False, head_size=80))
    assert (rope.head_size, rope.rotary_dim, rope.is_neox_style, rope.rotary_at_end) == (80, 64, False, False)
    mla = rope_from_module(module(small, is_neox_style=False, head_size=64), is_mla=True)
    assert (mla.head_size, mla.rotary_dim, mla.rotary_at_end) == (None, 64, True)


class TestLongRope:
    SHORT, LONG = KINDS["default"], KINDS["yarn"]

    def module(self, **attributes: Any) -> SimpleNamespace:
        both = torch.cat((table(self.SHORT, 4096, torch.float32), table(self.LONG, 16_384, torch.float32)))
        return SimpleNamespace(
            long_short_cos_sin_cache=both, original_max_position_embeddings=4096, head_size=64, **attributes
        )

    def is_like(self, read: RopeFrequencies, made_with: RopeFrequencies) -> bool:
        return torch.allclose(read.inv_freq, made_with.inv_freq, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("use_long_rope", [True, False])
    def test_vllm_has_chosen(self, use_long_rope):
        rope = rope_from_module(self.module(use_long_rope=use_long_rope))
        assert not rope.depends_on_length
        assert self.is_like(rope.frequencies(), self.LONG if use_long_rope else self.SHORT)

    def test_sglang_chooses_in_each_forward_by_the_largest_position(self):
        rope = rope_from_module(self.module())
        assert rope.depends_on_length
        assert self.is_like(rope.frequencies(4097), self.SHORT)
        assert self.is_like(rope.frequencies(4098), self.LONG)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (module(table(KINDS["default"], 64, torch.float32), mrope_section=[8, 12, 12]), "mRoPE"),
        (module(torch.rand(4096, 64)), "fixed angle a position"),
        (module(torch.cat([table(KINDS[kind], 512, torch.float32) for kind in ("default", "yarn")])), "fixed angle"),
        (module(table(KINDS["default"], 512, torch.float32) * torch.linspace(1, 2, 512)[:, None]), "fixed angle"),
        (module(torch.polar(torch.ones(64, 32), torch.rand(64, 32))), "complex64"),
        (module(torch.ones(1, 64)), r"\[1, 64\]"),
        (SimpleNamespace(head_size=64), "but none"),
    ],
)
def test_refused_in_words(broken, reason):
    with pytest.raises(UnsupportedRopeError, match=reason) as caught:
        rope_from_module(broken)
    assert "SimpleNamespace cannot be blended" in str(caught.value)
    assert "exact prefixes works as ever" in str(caught.value)
