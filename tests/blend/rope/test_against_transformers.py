"""Against transformers itself: its own models' caches, its own frequencies."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lmcache.blend.rope import FusedRope
from lmcache.blend.rope_from_config import ropes_from_config
from tests.blend.rope.configs import DYNAMIC, configs, llama, phi3_longrope

CONFIGS = configs()
TOKENS = 6


def make_model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@cache
def model_of(name: str) -> Any:
    return make_model(CONFIGS[name])


def cached_keys(model: Any, start: int, num_tokens: int = TOKENS) -> list[torch.Tensor]:
    """K ``[T, H, D]`` of every layer after a forward whose positions begin at ``start``."""
    tokens = torch.randint(3, 60, (1, num_tokens), generator=torch.Generator().manual_seed(7))
    positions = torch.arange(start, start + num_tokens)[None]
    with torch.inference_mode():
        layers = model(input_ids=tokens, position_ids=positions, use_cache=True).past_key_values.layers
    if hasattr(model.config, "qk_rope_head_dim"):  # transformers caches MLA's latent as K, its rope part as V
        return [torch.cat((layer.keys, layer.values), dim=-1)[0].transpose(0, 1).clone() for layer in layers]
    return [layer.keys[0].transpose(0, 1).clone() for layer in layers]


def move(rope: FusedRope | None, k: torch.Tensor, old: int, new: int, **lengths: int) -> torch.Tensor:
    steps = torch.arange(len(k))
    return k if rope is None else rope.fused_encode(old + steps, new + steps, k, **lengths)


@pytest.mark.parametrize(("old", "new"), [(0, 37), (300, 5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_moved_keys_are_those_that_the_model_computes_there(name, old, new):
    """RoPE sees distances only, so a whole prompt that is shifted has the same keys, turned."""
    theirs = cached_keys(model_of(name), new)
    ours = cached_keys(model_of(name), old)
    ropes = ropes_from_config(CONFIGS[name])
    assert len(ropes) == len(ours)
    for rope, k, expected in zip(ropes, ours, theirs, strict=True):
        unmoved = (k - expected).abs().max()
        move(rope, k, old, new)
        # transformers forms angles in float32: 300 · 2⁻²⁴ rad
        torch.testing.assert_close(k, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
        assert rope is None or unmoved > 0.1


def test_layers_without_positions():
    def with_rope(name: str) -> list[bool]:
        return [rope is not None for rope in ropes_from_config(CONFIGS[name])]

    assert with_rope("smollm3") == [True, True, True, False]
    assert with_rope("llama4") == [True, True, True, False]
    assert with_rope("cohere2") == [True, False, True, False]
    assert with_rope("exaone4") == [True, False, True, False]


def test_layers_of_one_kind_share_a_rope():
    ropes = ropes_from_config(CONFIGS["gemma3"])
    assert ropes[0] is ropes[2]
    assert ropes[1] is ropes[3]
    assert not torch.equal(ropes[0].frequencies().inv_freq, ropes[1].frequencies().inv_freq)


def check_frequencies(rope: FusedRope, inv_freq: torch.Tensor, attention_scaling: float, length: int | None = None):
    ours = rope.frequencies(length)
    assert torch.equal(ours.inv_freq, inv_freq.to(torch.float64))
    assert ours.attention_scaling == pytest.approx(attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gemma3", "olmo3", "gptj")])
def test_frequencies_are_the_models_to_the_bit(name):
    rotary = model_of(name).model.rotary_emb if name != "gpt_neox" else model_of(name).gpt_neox.rotary_emb
    rope = next(rope for rope in ropes_from_config(CONFIGS[name]) if rope is not None)
    check_frequencies(rope, rotary.inv_freq, rotary.attention_scaling)


@pytest.mark.parametrize("name", ["gemma3", "olmo3"])
def test_frequencies_of_layer_types(name):
    rotary = model_of(name).model.rotary_emb
    for rope, kind in zip(ropes_from_config(CONFIGS[name]), CONFIGS[name].layer_types, strict=True):
        check_frequencies(rope, getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling"))


class TestLengthDependent:
    """transformers chooses frequencies in each forward. One token alone has no attention to disturb: its keys in every
    layer depend on its position only through RoPE."""

    @pytest.mark.parametrize("length", [1, 512, 513, 4096])
    def test_longrope_frequencies(self, length):
        inv_freq, scaling = ROPE_INIT_FUNCTIONS["longrope"](phi3_longrope(), "cpu", seq_len=length)
        check_frequencies(ropes_from_config(phi3_longrope())[0], inv_freq, scaling, length)

    @pytest.mark.parametrize("length", [1, 256, 257, 4000])
    def test_dynamic_frequencies(self, length):
        config = llama(DYNAMIC, 256)
        inv_freq, scaling = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
        check_frequencies(ropes_from_config(config)[0], inv_freq, scaling, length)

    @pytest.mark.parametrize("config", [phi3_longrope(), llama(DYNAMIC, 256)], ids=["longrope", "dynamic"])
    @pytest.mark.parametrize(("old", "new"), [(3, 200), (3, 700), (700, 3), (700, 1500)])
    def test_keys_move_between_length_classes(self, config, old, new):
        theirs = cached_keys(make_model(config), new, num_tokens=1)
        ours = cached_keys(make_model(config), old, num_tokens=1)
        for rope, k, expected in zip(ropes_from_config(config), ours, theirs, strict=True):
            assert rope.depends_on_length
            move(rope, k, old, new, old_length=old + 1, new_length=new + 1)
            torch.testing.assert_close(k, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
            with pytest.raises(ValueError, match="sequence length"):
                move(rope, k, old, new)
