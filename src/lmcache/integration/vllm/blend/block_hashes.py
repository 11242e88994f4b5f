"""Keeps blended blocks out of vLLM's prefix cache, which is for exact KV."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

if TYPE_CHECKING:
    from vllm.v1.request import Request


class SaltedBlockHashes:
    """The names under which vLLM registers the blocks of one request.

    From the first blended block on, they are replaced by names that nobody else can know, before vLLM has registered
    any of them. vLLM derives the names of later blocks, of generated tokens too, from the last one, so these are
    nobody else's either. The request itself finds its blocks again, after a preemption for example.
    """

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._first: int | None = None

    def apply(self, request: Request, exact_tokens: int, block_size: int) -> None:
        """Let only blocks that lie in the first ``exact_tokens`` keep their names. One at least must have a name."""
        hashes = request.block_hashes
        # vLLM may hash in steps other than its blocks; then all blocks of the request are kept apart.
        regular = len(hashes) == request.num_tokens // block_size
        # The last of them always changes: a block that blended tokens fill later is named after it.
        first = min(exact_tokens // block_size, len(hashes) - 1) if regular else 0
        end = len(hashes) if self._first is None else self._first
        if first < end:
            old = hashes[first]
            # One stream of bytes for all: thousands of hashes, one by one, would take milliseconds.
            size = len(bytes(old))
            stream = blake3(bytes(old), key=self._salt).digest(size * (end - first))
            names: list[bytes] = np.frombuffer(stream, dtype=f"V{size}").tolist()
            hashes[first:end] = names if type(old) is bytes else map(type(old), names)
        self._first = min(first, end)
