"""Whole chunks between a dense staging buffer and an engine's pages, all of them and all layers in one launch.

Reference: :class:`lmcache.paging.token_connector.TokenConnector`, which moves token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lmcache.kernels.launch import launch

_BLOCK_TOKENS = 8


@dataclass(frozen=True)
class PageAddresses:
    """Where the planes of an engine's layers lie. What is moved are machine words of ``word`` (an integer type).

    ``bases``: int64 ``[layers, planes]`` on the device, the address of each plane's first word. A token's head is
    ``head_words`` words, ``head_strides[p]`` words behind the one before it. ``alignment``: bytes that every base, and
    words that every stride and offset, are multiples of.
    """

    bases: torch.Tensor
    word: torch.dtype
    num_heads: int
    head_words: int
    head_strides: tuple[int, ...]
    alignment: int


@triton.jit
def move_tokens(
    dense,
    in_chunk,
    block,
    staged_layer,
    BASES,
    base,
    OFFSETS,
    first_offset,
    head_stride,
    plane,
    PLANES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
    TO_PAGES: tl.constexpr,
):
    """Up to ``TOKENS`` tokens of one plane of one layer, between the ``in_chunk`` tokens at ``dense`` and the pages."""
    r = block * TOKENS * BLOCK_H + tl.arange(0, TOKENS * BLOCK_H)
    t = r // BLOCK_H
    h = r % BLOCK_H
    inside = (t < in_chunk) & (h < HEADS)
    at = tl.load(OFFSETS + first_offset + t, mask=inside, other=-1)
    moves = inside & (at >= 0)
    at = tl.multiple_of(at, ALIGN)
    w = tl.arange(0, BLOCK_W)
    mask = moves[:, None] & (w < WORDS)[None, :]
    pages = tl.multiple_of(tl.load(BASES + base), 16).to(dense.dtype)
    in_pages = (pages + at + h * head_stride)[:, None] + w[None, :]
    row = ((staged_layer * PLANES + plane).to(tl.int64) * in_chunk + t) * (HEADS * WORDS) + h * WORDS
    in_dense = (dense + row)[:, None] + w[None, :]
    if TO_PAGES:
        tl.store(in_pages, tl.load(in_dense, mask=mask, other=0), mask=mask)
    else:
        tl.store(in_dense, tl.load(in_pages, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "chunk_tokens", "first_layer", "total_tokens"])
def _copy_kernel(
    STAGED,
    BASES,
    OFFSETS,
    num_tokens,
    chunk_tokens,
    total_tokens,
    first_layer,
    head_stride,
    plane,
    PLANES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
    TO_PAGES: tl.constexpr,
):
    layer = tl.program_id(1)
    first_token = tl.program_id(2) * chunk_tokens
    chunk_words = tl.num_programs(1).to(tl.int64) * PLANES * chunk_tokens * (HEADS * WORDS)
    move_tokens(
        STAGED + tl.program_id(2) * chunk_words,
        tl.minimum(chunk_tokens, num_tokens - first_token),
        tl.program_id(0),
        layer,
        BASES,
        (first_layer + layer) * PLANES + plane,
        OFFSETS,
        plane * total_tokens + first_token,
        head_stride,
        plane,
        PLANES,
        HEADS,
        BLOCK_H,
        WORDS,
        BLOCK_W,
        ALIGN,
        TOKENS,
        TO_PAGES,
    )


def copy_chunks(
    staged: torch.Tensor,
    pages: PageAddresses,
    offsets: torch.Tensor,
    num_tokens: int,
    total_tokens: int,
    layers: range,
    *,
    to_pages: bool,
) -> None:
    """Args:
    staged: ``[chunks, layers, planes, tokens, heads · words]``, dense, on the device, of the word type. The last chunk
        may hold fewer tokens: they lie dense in the beginning of its share.
    offsets: int64 on the device: the words from a plane's base to each token, −1 for a token that is left out. That of
        token ``t`` in plane ``p`` is ``offsets[p · total_tokens + t]``.
    num_tokens: of all chunks together.
    layers: of the engine, those in ``staged``.
    """
    chunks, _, planes, chunk_tokens, _ = staged.shape
    for plane in range(planes):
        launch(
            _copy_kernel,
            (triton.cdiv(chunk_tokens, _BLOCK_TOKENS), len(layers), chunks),
            staged,
            pages.bases,
            offsets,
            num_tokens,
            chunk_tokens,
            total_tokens,
            layers.start,
            pages.head_strides[plane],
            plane,
            PLANES=planes,
            HEADS=pages.num_heads,
            BLOCK_H=triton.next_power_of_2(pages.num_heads),
            WORDS=pages.head_words,
            BLOCK_W=triton.next_power_of_2(pages.head_words),
            ALIGN=pages.alignment,
            TOKENS=_BLOCK_TOKENS,
            TO_PAGES=to_pages,
            num_warps=4,
        )
