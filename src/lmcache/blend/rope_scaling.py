"""The inverse frequencies of RoPE and of its scaled variants.

Computed in float32, operation by operation as the models do it: a model's frequencies *are* these rounded numbers, and
over a distance of 1,000,000 positions the difference to the exact formula is a visible angle.

``rotary_dim`` is the number of elements of a head that turn, ``theta`` the base of the geometric row of wavelengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from lmcache.blend.rope import FrequenciesAtLength, RopeFrequencies


def default_frequencies(rotary_dim: int, theta: float) -> RopeFrequencies:
    """``theta^(−2i / rotary_dim)`` (Su et al. 2021, arXiv:2104.09864)."""
    return RopeFrequencies(1.0 / _wavelengths(rotary_dim, theta))


def linear_frequencies(rotary_dim: int, theta: float, *, factor: float) -> RopeFrequencies:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): all positions lie ``factor`` times as close."""
    return RopeFrequencies(1.0 / _wavelengths(rotary_dim, theta) / factor)


def dynamic_ntk_frequencies(
    rotary_dim: int, theta: float, *, factor: float, max_position_embeddings: int
) -> FrequenciesAtLength:
    """NTK-aware scaling whose base grows with the sequence, once it is longer than ``max_position_embeddings``.

    Every longer length has frequencies of its own; all others share one object.
    """

    @lru_cache(maxsize=64)
    def at_grown_length(length: int) -> RopeFrequencies:
        growth = factor * length / max_position_embeddings - (factor - 1)
        return default_frequencies(rotary_dim, theta * growth ** (rotary_dim / (rotary_dim - 2)))

    def at_length(length: int) -> RopeFrequencies:
        return at_grown_length(max(length, max_position_embeddings))

    return at_length


def llama3_frequencies(
    rotary_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> RopeFrequencies:
    """Llama 3.1: long wavelengths are interpolated, short ones left alone, those in between are blended."""
    inv_freq = 1.0 / _wavelengths(rotary_dim, theta)
    wavelength = 2 * math.pi / inv_freq
    turns = original_max_position_embeddings / wavelength
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    is_long = wavelength > original_max_position_embeddings / low_freq_factor
    is_short = wavelength < original_max_position_embeddings / high_freq_factor
    return RopeFrequencies(torch.where(is_long, inv_freq / factor, torch.where(is_short, inv_freq, blended)))


def yarn_frequencies(
    rotary_dim: int,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> RopeFrequencies:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolation by parts, and a factor on cos and sin."""

    def pair_that_turns(times: float) -> float:
        """The pair, as a real number, that turns so many times over the trained length."""
        return rotary_dim * math.log(original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # the ramp divides by the difference
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp

    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    wavelengths = _wavelengths(rotary_dim, theta)
    inv_freq = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return RopeFrequencies(inv_freq, attention_factor)


def longrope_frequencies(
    rotary_dim: int,
    theta: float,
    *,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_max_position_embeddings: int,
    factor: float,
    attention_factor: float | None = None,
) -> FrequenciesAtLength:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor a pair, from one list or the other by length."""
    for name, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(factors) != rotary_dim // 2:
            raise ValueError(f"{name} has {len(factors)} entries, rotary_dim={rotary_dim} wants {rotary_dim // 2}")
    if attention_factor is None:
        attention_factor = 1.0
        if factor > 1:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))
    wavelengths = _wavelengths(rotary_dim, theta)
    short, long = (
        RopeFrequencies(1.0 / (torch.tensor(factors, dtype=torch.float32) * wavelengths), attention_factor)
        for factors in (short_factor, long_factor)
    )

    def at_length(length: int) -> RopeFrequencies:
        return long if length > original_max_position_embeddings else short

    return at_length


def _wavelengths(rotary_dim: int, theta: float) -> torch.Tensor:
    """``theta^(2i / rotary_dim)``, float32 ``[rotary_dim / 2]``: positions a radian."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim={rotary_dim}: must be even and at least 2")
    wavelengths: torch.Tensor = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    return wavelengths


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
