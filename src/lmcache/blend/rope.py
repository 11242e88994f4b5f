"""RoPE re-rotation: K that was computed at one position, moved to another without the hidden states.

RoPE (Su et al. 2021, arXiv:2104.09864) turns pair ``i`` of a key at position ``p`` by the angle ``p · inv_freq[i]``.
Rotations of a plane add up, ``Rot(b) · Rot(−a) = Rot(b − a)``, so a key is moved by one more rotation, whatever the
frequencies are. A factor on cos and sin (yarn, longrope) is in K already and stays as it is.

Angles are formed in float64: at position 1,000,000 a float32 angle is off by up to 0.03 rad, more than bfloat16 rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

Positions: TypeAlias = "torch.Tensor | int"

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Elements that are turned at a time on a CPU, so that their float32 copy (1 MiB) stays in the cache. For 8,192 tokens
# of 8 heads of 128 that is 1.5 to 2 times as fast as all at once; smaller blocks pay for the calls.
_CPU_BLOCK = 1 << 18


class UnsupportedRopeError(ValueError):
    """K of this model cannot be moved to other positions. The message names the model, why, and what still works."""


@dataclass(frozen=True, eq=False)
class RopeFrequencies:
    """What RoPE turns by.

    Attributes:
        inv_freq: ``[rotary_dim / 2]``, radians a position, one a pair; kept in float64 on the CPU. The value that the
            model computes with counts, which is as a rule a float32.
        attention_scaling: the factor that the model puts on cos and sin (yarn's and longrope's ``mscale``).
    """

    inv_freq: torch.Tensor
    attention_scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.inv_freq.ndim != 1 or not len(self.inv_freq) or not self.inv_freq.is_floating_point():
            raise ValueError(
                f"inv_freq must be a row of at least one real number, got {self.inv_freq.dtype} of shape "
                f"{list(self.inv_freq.shape)}"
            )
        if not self.attention_scaling > 0:
            raise ValueError(f"attention_scaling={self.attention_scaling}: must be positive")
        object.__setattr__(self, "inv_freq", self.inv_freq.detach().to("cpu", torch.float64))

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


FrequenciesAtLength: TypeAlias = Callable[[int], RopeFrequencies]


class FusedRope:
    """Turns the keys of one layer, in place.

    Args:
        frequencies: of the layer; a function of the sequence length where that decides (dynamic NTK, longrope). The
            function gives the same object for lengths of one class.
        head_size: elements of a head, checked against the keys and needed for keys ``[T, H·D]``; None when it differs
            from store to store (MLA).
        is_neox_style: pair ``i`` is elements ``i`` and ``i + rotary_dim/2``; False: ``2i`` and ``2i + 1`` (GPT-J).
            It is the order *in the cache* that counts.
        rotary_at_end: the last ``rotary_dim`` elements of a head turn, as in MLA; False: the first.

    Keys are ``[T, H, D]`` or ``[T, H·D]`` of bfloat16, float16, float32 or float64, views of pages included. The work
    is done in float32 (float64 for float64) and rounded to the keys' type once. Beyond that rounding the error is at
    most ``3 · 2⁻²⁴ ·`` the length of the pair; for float32 this stands for the rounding too.

    Positions are integers: one a token, or one for all. Leave them on the CPU when the keys are on an accelerator:
    tokens that all move by one distance are seen without a synchronisation, and share one row of cos and sin.

    A rope that ``depends_on_length`` must be told how long the sequence was that the keys were computed in, and how
    long the one is that they go to. The length is the one that chose the model's frequencies: transformers takes the
    largest position of the forward plus one (and dynamic NTK keeps the largest length that it has seen until a prompt
    is shorter than the trained length); vLLM fixes it by ``max_model_len``, so that :func:`rope_from_module` and
    :meth:`at_length` need none.
    """

    def __init__(
        self,
        frequencies: RopeFrequencies | FrequenciesAtLength,
        *,
        head_size: int | None,
        is_neox_style: bool = True,
        rotary_at_end: bool = False,
    ) -> None:
        self._frequencies = frequencies
        self.head_size = head_size
        self.is_neox_style = is_neox_style
        self.rotary_at_end = rotary_at_end
        self.rotary_dim = (frequencies if isinstance(frequencies, RopeFrequencies) else frequencies(1)).rotary_dim
        if head_size is not None and head_size < self.rotary_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim} does not fit in head_size={head_size}")

    def __repr__(self) -> str:
        return (
            f"FusedRope(rotary_dim={self.rotary_dim}, head_size={self.head_size}, is_neox_style={self.is_neox_style}, "
            f"rotary_at_end={self.rotary_at_end}, depends_on_length={self.depends_on_length})"
        )

    @property
    def depends_on_length(self) -> bool:
        return not isinstance(self._frequencies, RopeFrequencies)

    def frequencies(self, length: int | None = None) -> RopeFrequencies:
        """Those of a sequence of ``length`` tokens.

        Raises:
            ValueError: they depend on the length, and it is not given.
        """
        if isinstance(self._frequencies, RopeFrequencies):
            return self._frequencies
        if length is None:
            raise ValueError(
                "the frequencies of this model depend on the sequence length (dynamic NTK or longrope): pass "
                "old_length and new_length (length to encode and reverse_encode), or fix it with at_length()"
            )
        return self._frequencies(length)

    def at_length(self, length: int) -> FusedRope:
        """The same, with the frequencies of ``length`` for good, as in an engine that fixes its longest sequence."""
        return FusedRope(
            self.frequencies(length),
            head_size=self.head_size,
            is_neox_style=self.is_neox_style,
            rotary_at_end=self.rotary_at_end,
        )

    @torch.inference_mode()
    def fused_encode(
        self,
        old_positions: Positions,
        new_positions: Positions,
        k: torch.Tensor,
        *,
        old_length: int | None = None,
        new_length: int | None = None,
    ) -> torch.Tensor:
        """Move ``k`` from ``old_positions`` to ``new_positions``, in place, with one rounding.

        Args:
            old_positions: int ``[T]`` or one for all, where the keys were computed; ``new_positions``: where they go.
            k: ``[T, H, D]`` or ``[T, H·D]``.
            old_length: tokens of the sequence that the keys come from; ``new_length``: of the one they go to. Needed
                only if the rope ``depends_on_length``.

        Returns:
            ``k`` itself. Keys that stay where they are keep every bit.

        Raises:
            ValueError: a shape or type does not fit, or a length is missing.
        """
        keys = self._rotary_part(k)
        old, new = _checked_positions(old_positions, len(k)), _checked_positions(new_positions, len(k))
        angles, gain = self.turn(old, new, old_length, new_length)
        if gain == 1.0 and angles.device.type == "cpu" and not angles.any():
            return k
        self._turn(keys, angles, gain)
        return k

    def turn(
        self, old: torch.Tensor, new: torch.Tensor, old_length: int | None = None, new_length: int | None = None
    ) -> tuple[torch.Tensor, float]:
        """What :meth:`fused_encode` turns by: angles, float64 ``[T, rotary_dim / 2]`` (``[1, …]`` where all tokens move
        by one distance), and the factor on cos and sin. Positions are int64 ``[T]``."""
        source, target = self.frequencies(old_length), self.frequencies(new_length)
        if source is target:
            return _angles(_one_if_equal(new - old), source), 1.0
        return _angles(new, target) - _angles(old, source), target.attention_scaling / source.attention_scaling

    @torch.inference_mode()
    def encode(
        self, positions: Positions, q: torch.Tensor, k: torch.Tensor, *, length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate, as the model does: ``q`` and ``k`` without positions go to ``positions``, in place.

        With :meth:`reverse_encode` this makes the pair of encoders that ``CacheBlendImpl`` takes. Together they round
        twice where :meth:`fused_encode` rounds once.
        """
        frequencies = self.frequencies(length)
        return self._encode_both(positions, q, k, frequencies, 1.0, frequencies.attention_scaling)

    @torch.inference_mode()
    def reverse_encode(
        self, positions: Positions, q: torch.Tensor, k: torch.Tensor, *, length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Undo :meth:`encode`, in place, its ``attention_scaling`` included."""
        frequencies = self.frequencies(length)
        return self._encode_both(positions, q, k, frequencies, -1.0, 1 / frequencies.attention_scaling)

    def _encode_both(
        self,
        positions: Positions,
        q: torch.Tensor,
        k: torch.Tensor,
        frequencies: RopeFrequencies,
        sign: float,
        gain: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for heads in (q, k):
            at = _one_if_equal(_checked_positions(positions, len(heads)))
            self._turn(self._rotary_part(heads), sign * _angles(at, frequencies), gain)
        return q, k

    def _rotary_part(self, k: torch.Tensor) -> torch.Tensor:
        """The elements that turn: a view ``[T, H, rotary_dim]`` of ``k``."""
        if k.dtype not in _DTYPES:
            raise ValueError(
                f"keys of {k.dtype} cannot be turned, only {', '.join(map(str, _DTYPES))}: dequantise first"
            )
        width = self.head_size
        heads = k
        if k.ndim == 2 and width is not None and k.shape[1] % width == 0:
            heads = k.view(len(k), k.shape[1] // width, width)
        if heads.ndim != 3 or heads.shape[2] < self.rotary_dim or width not in (None, heads.shape[2]):
            wanted = f"[T, H, {self.rotary_dim} or more]" if width is None else f"[T, H, {width}] or [T, H·{width}]"
            raise ValueError(f"keys must be {wanted}, got {list(k.shape)}")
        return heads[..., -self.rotary_dim :] if self.rotary_at_end else heads[..., : self.rotary_dim]

    def _turn(self, keys: torch.Tensor, angles: torch.Tensor, gain: float) -> None:
        """Turn ``keys`` ``[T, H, rotary_dim]`` by ``angles``, float64 ``[T or 1, rotary_dim / 2]``, and scale them."""
        if not keys.numel():
            return
        dtype = torch.promote_types(keys.dtype, torch.float32)
        num_tokens = len(keys)
        cos, sin = ((part * gain).to(keys.device, dtype)[:, None] for part in (angles.cos(), angles.sin()))
        rows = max(1, _CPU_BLOCK // keys[0].numel()) if keys.device.type == "cpu" else num_tokens
        blocks = (torch.split(part.expand(num_tokens, -1, -1), rows) for part in (keys, cos, sin))
        turn = _turn_halves if self.is_neox_style else _turn_interleaved
        for block, block_cos, block_sin in zip(*blocks, strict=True):
            work = block.to(dtype, copy=True, memory_format=torch.contiguous_format)
            turn(work, block_cos, block_sin)
            block.copy_(work)


def _turn_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    first, second = x.chunk(2, dim=-1)
    turned = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)


def _turn_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(torch.complex(cos, sin))


def _angles(positions: torch.Tensor, frequencies: RopeFrequencies) -> torch.Tensor:
    return positions.to(torch.float64)[:, None] * frequencies.inv_freq.to(positions.device)


def _one_if_equal(positions: torch.Tensor) -> torch.Tensor:
    """The first of ``positions`` alone if all are equal and looking costs no synchronisation."""
    if len(positions) > 1 and positions.device.type == "cpu" and bool((positions == positions[0]).all()):
        return positions[:1]
    return positions


def _checked_positions(positions: Positions, num_tokens: int) -> torch.Tensor:
    """As int64 ``[num_tokens]`` or ``[1]``."""
    tensor = torch.as_tensor(positions)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"positions must be integers, got {tensor.dtype}")
    if tensor.ndim > 1:
        raise ValueError(
            f"positions must be one integer a token, got shape {list(tensor.shape)}; positions on several axes (mRoPE) "
            "are not supported"
        )
    if tensor.numel() not in (1, num_tokens):
        raise ValueError(f"{tensor.numel()} positions for {num_tokens} tokens: give one a token, or one for all")
    return tensor.to(torch.int64).reshape(-1)
