"""The rope of a running engine's layer, from its own rotary module.

vLLM and SGLang keep a table of cos and sin by position. Frequencies are read from that table, whatever scaling made it,
so the engine's own choices (``max_model_len``, overrides, a table in bfloat16) are met without knowing them. Imports no
engine: any object with these attributes does.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lmcache.blend.rope import FrequenciesAtLength, FusedRope, RopeFrequencies, UnsupportedRopeError

_SAMPLED_ROWS = 1024


def rope_from_module(module: Any, *, is_mla: bool = False) -> FusedRope:
    """The rope of a rotary module (``get_rope(…)`` of vLLM or SGLang).

    Args:
        module: has ``cos_sin_cache`` ``[positions, rotary_dim]`` (cos of all pairs, then sin), ``is_neox_style`` and
            ``head_size``; or Phi-3's ``long_short_cos_sin_cache``.
        is_mla: the keys are MLA's ``[T, 1, latent + rotary_dim]``, which the module does not know.

    Raises:
        UnsupportedRopeError: the module's positions have several axes, or its table is not one of a rotation by a fixed
            angle a position.
    """
    name = type(module).__name__
    if getattr(module, "mrope_section", None):
        raise _unsupported(name, "its positions have several axes (mRoPE)")
    try:
        frequencies = _frequencies(module)
    except ValueError as error:
        raise _unsupported(name, str(error)) from None
    return FusedRope(
        frequencies,
        head_size=None if is_mla else module.head_size,
        is_neox_style=getattr(module, "is_neox_style", True),  # Phi-3's longrope knows no other
        rotary_at_end=is_mla,
    )


def _unsupported(name: str, reason: str) -> UnsupportedRopeError:
    return UnsupportedRopeError(
        f"a model with {name} cannot be blended: {reason}, so a cached passage cannot be moved to another position. "
        "Reuse of exact prefixes works as ever."
    )


def _frequencies(module: Any) -> RopeFrequencies | FrequenciesAtLength:
    both = getattr(module, "long_short_cos_sin_cache", None)
    if both is None:
        return _read_table(getattr(module, "cos_sin_cache", None))
    trained: int = module.original_max_position_embeddings
    short, long = _read_table(both[:trained]), _read_table(both[trained:])
    use_long: bool | None = getattr(module, "use_long_rope", None)
    if use_long is not None:  # vLLM: chosen once, by max_model_len
        return long if use_long else short
    # SGLang: chosen in each forward, and by the largest position itself: the length trained + 1 is still short.
    return lambda length: long if length - 1 > trained else short


def _read_table(table: torch.Tensor | None) -> RopeFrequencies:
    """Undo ``table[p] = scaling · (cos(p · inv_freq), sin(p · inv_freq))``.

    The angle at position 1 gives a first estimate of each frequency; at 2, 4, 8, … the turns that it predicts are
    counted out and what is left makes it twice as sharp; a least-squares fit over sampled rows ends it. Over all the
    positions of the table the angle is then right to 1e-3 rad for a table in bfloat16, whose own entries are off by as
    much as 4e-3, and to the rounding of the float32 frequencies that made it for one in float32.

    Raises:
        ValueError: it is not such a table.
    """
    if table is None or not table.is_floating_point() or table.ndim != 2 or len(table) < 2 or table.shape[1] % 2:
        found = "none" if table is None else f"{table.dtype} of shape {list(table.shape)}"
        raise ValueError(f"it has no table of cos and sin [positions, rotary_dim], but {found}")
    last = len(table) - 1
    doubling = [1 << i for i in range(last.bit_length())]
    spread = torch.linspace(1, last, min(last, _SAMPLED_ROWS), dtype=torch.float64).round().long()
    rows = torch.cat((torch.tensor(doubling), spread))
    cos, sin = table[rows.to(table.device)].to("cpu", torch.float64).chunk(2, dim=-1)
    angles, radii = torch.atan2(sin, cos), torch.hypot(cos, sin)
    positions = rows.to(torch.float64)[:, None]

    inv_freq = angles[0]
    for step in range(1, len(doubling)):
        inv_freq = inv_freq + _wrapped(angles[step] - positions[step] * inv_freq) / positions[step]
    misses = _wrapped(angles - positions * inv_freq)
    inv_freq = inv_freq + (positions * misses).sum(dim=0) / positions.square().sum()

    scaling = float(radii.mean())
    misses = _wrapped(angles - positions * inv_freq)
    # Rounding stays well below this, also that of a float32 angle at position 1,000,000; other kinds of tables do not.
    if not float(misses.abs().max()) < 0.2 or not float((radii / scaling - 1).abs().max()) < 0.02:
        raise ValueError("its table of cos and sin is not that of a rotation by a fixed angle a position")
    return RopeFrequencies(inv_freq, scaling)


def _wrapped(angle: torch.Tensor) -> torch.Tensor:
    """The same angle in −π … π."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
