"""Against vLLM's own rotary modules: their keys at one position, moved, are theirs at the other."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache.blend.rope import UnsupportedRopeError
from lmcache.blend.rope_from_module import rope_from_module
from tests.blend.rope.configs import LONGROPE

pytestmark = pytest.mark.vllm

HEAD_SIZE = 64
MAX_POSITION = 4096
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
SCALED: dict[str, dict[str, Any]] = {
    "default": DEFAULT,
    "partial": {**DEFAULT, "partial_rotary_factor": 0.25},
    "linear": {**DEFAULT, "rope_type": "linear", "factor": 4.0},
    "dynamic": {**DEFAULT, "rope_type": "dynamic", "factor": 4.0, "max_trained_positions": 2048},
    "dynamic alpha": {**DEFAULT, "rope_type": "dynamic", "alpha": 1000.0},
    "ntk": {**DEFAULT, "rope_type": "ntk", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {**DEFAULT, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
    "deepseek_yarn": {
        **DEFAULT,
        "rope_type": "deepseek_yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "proportional": {**DEFAULT, "rope_type": "proportional", "partial_rotary_factor": 0.25},
}
LONGROPE_64 = {**LONGROPE, "short_factor": LONGROPE["short_factor"] * 4, "long_factor": LONGROPE["long_factor"] * 4}


@pytest.fixture(scope="module")
def vllm_config() -> Iterator[Any]:
    """vLLM's modules are made inside a configuration."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def get_rope(vllm_config) -> Any:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    return get_rope


def rotate(module: Any, positions: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """vLLM's own result, of its own torch code. DeepSeek's module takes heads, the others ``[T, H·D]``."""
    forward = getattr(module, "forward_native", module.forward)
    heads = k.clone() if type(module).__name__.startswith("Deepseek") else k.flatten(1)
    return forward(positions, heads.clone(), heads)[1].view(k.shape)


def check_moves(module: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(40, 2, module.head_size, generator=generator).to(dtype)
    rope = rope_from_module(module)
    old = torch.arange(40)
    for new in (old + 900, torch.randint(0, 1000, (40,), generator=generator)):
        moved = rotate(module, old, k)
        rope.fused_encode(old, new, moved)
        expected = rotate(module, new, k)
        # float32: vLLM's angles, 1000 · 2⁻²⁴. bfloat16: its table, its products, its result and ours all round.
        tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(moved, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("name", SCALED)
def test_moved_keys_are_those_that_vllm_makes_there(get_rope, name, is_neox_style, dtype):
    module = get_rope(HEAD_SIZE, MAX_POSITION, is_neox_style, dict(SCALED[name]), dtype)
    check_moves(module, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_model_len", [512, 4096])
def test_longrope_is_chosen_by_max_model_len(vllm_config, get_rope, monkeypatch, max_model_len, dtype):
    from vllm.model_executor.layers import rotary_embedding

    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})  # vLLM keeps modules by their arguments alone
    monkeypatch.setattr(vllm_config, "model_config", SimpleNamespace(max_model_len=max_model_len))
    module = get_rope(HEAD_SIZE, MAX_POSITION, True, dict(LONGROPE_64), dtype)
    assert module.use_long_rope is (max_model_len > 512)
    if module.use_long_rope:
        check_moves(module, dtype)
    factors = torch.tensor(LONGROPE_64["long_factor" if module.use_long_rope else "short_factor"])
    expected = (1 / (factors * 10_000 ** (torch.arange(0, 64, 2) / 64))).double()
    read = rope_from_module(module)
    assert not read.depends_on_length
    error = (read.frequencies().inv_freq - expected).abs() * (MAX_POSITION if module.use_long_rope else 512)
    assert error.max() < 1e-3


@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn", "deepseek_yarn"])
def test_frequencies_of_a_float32_table_are_vllms(get_rope, name):
    module = get_rope(HEAD_SIZE, MAX_POSITION, True, dict(SCALED[name]), torch.float32)
    theirs = module._compute_inv_freq(module.scaling_factor if "yarn" in name else module.base).double()
    if name == "linear":
        theirs = theirs / 4
    ours = rope_from_module(module).frequencies().inv_freq
    torch.testing.assert_close(ours, theirs, rtol=2.0**-23, atol=0)


def test_mla_cache_of_deepseek(get_rope):
    """vLLM caches ``[T, latent + rope]``; the module knows of the rope part alone."""
    module = get_rope(HEAD_SIZE, MAX_POSITION, False, dict(SCALED["deepseek_yarn"]), torch.float32)
    latent, part = torch.randn(20, 1, 512), torch.randn(20, 1, HEAD_SIZE)
    old, new = torch.arange(20), torch.arange(20) + 333
    cache = torch.cat((latent, rotate(module, old, part)), dim=-1)
    rope_from_module(module, is_mla=True).fused_encode(old, new, cache)
    assert torch.equal(cache[..., :512], latent)
    torch.testing.assert_close(cache[..., 512:], rotate(module, new, part), rtol=0, atol=3e-4)


def test_several_axes_are_refused(get_rope):
    module = get_rope(HEAD_SIZE, MAX_POSITION, True, {**DEFAULT, "mrope_section": [8, 12, 12]}, torch.float32)
    with pytest.raises(UnsupportedRopeError, match=r"MRotaryEmbedding cannot be blended: .*mRoPE"):
        rope_from_module(module)
