"""The rotary kernel that SGLang imports from vLLM where it knows no accelerator of its own.

Its own CPU kernels (``SGLANG_USE_CPU_ENGINE=1``) are a package built apart, for Intel AMX. Without them the constructor
of its ``RotaryEmbedding`` fails where this cannot be imported. SGLang 0.5.23 then runs its own PyTorch version and
never calls this one; it computes what vLLM's does, so that an SGLang that does call it is right.
"""

from __future__ import annotations

import torch


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    """Rotate ``query`` and ``key`` in place.

    ``positions``: ``[tokens]``; ``query``, ``key``: ``[tokens, heads * head_size]``; ``cos_sin_cache``: ``[positions,
    rotary_dim]``, cosines then sines; ``is_neox``: pairs are ``(i, i + rotary_dim / 2)``, else ``(2 i, 2 i + 1)``.
    """
    # [tokens, 1, rotary_dim / 2] each, in fp32 as vLLM's kernel computes
    cos, sin = cos_sin_cache[positions.flatten()].float().unsqueeze(1).chunk(2, dim=-1)
    for rows in (query, key):
        if rows is not None:
            heads = rows.view(positions.numel(), -1, head_size)
            _rotate(heads[..., : 2 * cos.shape[-1]], cos, sin, is_neox)


def _rotate(rotary: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> None:
    half = cos.shape[-1]
    first, second = (rotary[..., :half], rotary[..., half:]) if is_neox else (rotary[..., 0::2], rotary[..., 1::2])
    x, y = first.float(), second.float()  # of fp32 rows these are the rows themselves: compute both, then write
    rotated = x * cos - y * sin, y * cos + x * sin
    first.copy_(rotated[0])
    second.copy_(rotated[1])
