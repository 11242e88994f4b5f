"""A prompt cut into the chunks that are stored and found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lmcache.keys import CacheKey, Namespace, PrefixKey, Tokens, placed_segment_key

# What is shorter is computed faster than it is found: a question, a heading between two passages.
MIN_RUN_TOKENS = 64


class Chunk(NamedTuple):
    """The tokens ``[start, end)`` of a prompt, and what they are called: together with all before them (a
    ``PrefixKey``), or by themselves."""

    key: CacheKey
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Prompt:
    """``chunks`` cover the tokens from 0; the first ``start`` tokens are already where they are to be."""

    tokens: Tokens
    start: int
    chunks: Sequence[Chunk]
    chunk_size: int

    def __len__(self) -> int:
        return len(self.tokens)

    def wanted(self) -> list[Chunk]:
        """The chunks that begin at or after ``start``."""
        return [chunk for chunk in self.chunks if chunk.start >= self.start]


def cut(num_tokens: int, keys: Sequence[PrefixKey], chunk_size: int) -> list[Chunk]:
    """The chunk of each key; one beyond the full chunks is the partial tail."""
    return [Chunk(key, i * chunk_size, min((i + 1) * chunk_size, num_tokens)) for i, key in enumerate(keys)]


def placed_chunks(namespace: Namespace, tokens: Tokens, start: int, end: int, chunk_size: int) -> list[Chunk]:
    """Chunks of ``tokens[start:end]`` that are found by themselves, where they stand in no prefix of whole chunks."""
    ranges = [(first, min(first + chunk_size, end)) for first in range(start, end, chunk_size)]
    return [Chunk(placed_segment_key(namespace, tokens[first:last], first), first, last) for first, last in ranges]


def leading_false(mask: torch.Tensor | None, num_tokens: int) -> int:
    """How many leading tokens ``mask`` leaves out.

    Raises:
        ValueError: ``mask`` is not bool ``[num_tokens]``, or not a run of False followed by a run of True.
    """
    if mask is None:
        return 0
    if mask.dtype != torch.bool or tuple(mask.shape) != (num_tokens,):
        raise ValueError(f"mask: expected bool [{num_tokens}], got {mask.dtype} {list(mask.shape)}")
    start = num_tokens - int(mask.sum())
    if not bool(mask[start:].all()):
        raise ValueError("mask: expected a run of False followed by a run of True, got them mixed")
    return start
