"""Whole chunks from an engine's pages straight into pinned host memory, by a few of the GPU's multiprocessors.

What copies memory without them is one queue in each direction: the token that an engine waits for at the end of each
step would stand in line behind whole chunks, whatever their size and the priority of their stream (on an H100 5 ms
behind 256 MiB).

Reference: :class:`lmcache.paging.token_connector.TokenConnector`, which moves token by token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmcache.kernels.chunk_copy import PageAddresses, move_tokens
from lmcache.kernels.launch import launch

_BLOCK_TOKENS = 8
# Few enough that the engine's own copies find the bus free and its kernels the multiprocessors.
_PROGRAMS = 2
_WORDS = {torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.uint8: tl.uint8}


@triton.jit(do_not_specialize=["chunks", "layers", "num_tokens", "chunk_tokens", "first_layer", "total_tokens"])
def _to_host_kernel(
    CHUNKS,
    BASES,
    OFFSETS,
    chunks,
    layers,
    num_tokens,
    chunk_tokens,
    total_tokens,
    first_layer,
    head_stride,
    plane,
    WORD: tl.constexpr,
    PLANES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK_ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    blocks = tl.cdiv(chunk_tokens, TOKENS)
    for piece in range(tl.program_id(0), chunks * layers * blocks, tl.num_programs(0)):
        block = piece % blocks
        layer = piece // blocks % layers
        chunk = piece // blocks // layers
        first_token = chunk * chunk_tokens
        move_tokens(
            tl.multiple_of(tl.load(CHUNKS + chunk), CHUNK_ALIGN).to(tl.pointer_type(WORD)),
            tl.minimum(chunk_tokens, num_tokens - first_token),
            block,
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
            False,
        )


def copy_to_host(
    chunks: torch.Tensor,
    pages: PageAddresses,
    offsets: torch.Tensor,
    num_tokens: int,
    chunk_tokens: int,
    total_tokens: int,
    layers: range,
    *,
    alignment: int,
    programs: int = _PROGRAMS,
) -> None:
    """Args:
    chunks: int64 ``[chunks]`` on the device: where each chunk's ``layers`` begin, ``[layers, planes, tokens, heads ·
        words]``, dense, in memory that the device can write to. ``chunk_tokens`` tokens, but the last may hold fewer.
    alignment: bytes that all of ``chunks`` are multiples of.
    offsets, num_tokens, total_tokens, layers: as of :func:`~lmcache.kernels.chunk_copy.copy_chunks`. A token that is
        left out keeps what its chunk had in its place.
    programs: how many work at once; more take the multiprocessors from whatever else runs there.
    """
    for plane, head_stride in enumerate(pages.head_strides):
        launch(
            _to_host_kernel,
            (programs,),
            chunks,
            pages.bases,
            offsets,
            len(chunks),
            len(layers),
            num_tokens,
            chunk_tokens,
            total_tokens,
            layers.start,
            head_stride,
            plane,
            WORD=_WORDS[pages.word],
            PLANES=len(pages.head_strides),
            HEADS=pages.num_heads,
            BLOCK_H=triton.next_power_of_2(pages.num_heads),
            WORDS=pages.head_words,
            BLOCK_W=triton.next_power_of_2(pages.head_words),
            ALIGN=pages.alignment,
            CHUNK_ALIGN=alignment,
            TOKENS=_BLOCK_TOKENS,
            num_warps=4,
        )
