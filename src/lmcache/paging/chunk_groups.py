"""Chunks that are moved together: some layers of some chunks at a time, as many as a staging buffer holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from lmcache.memory.device_copy import Addresses
from lmcache.memory.memory_obj import MemoryObj


@dataclass(frozen=True)
class ChunkGroup:
    """``layers`` of ``chunks`` (indices). In a staging buffer each chunk has the room of a full one."""

    chunks: range
    layers: range


class UniformChunks:
    """Chunks of consecutive tokens with the same number of them; only the last one may have fewer.

    Each holds ``[layers, …]`` with the tokens of a layer side by side.
    """

    def __init__(self, objs: Sequence[MemoryObj], token_bytes: int) -> None:
        """``token_bytes``: of a token in one layer."""
        self.objs = objs
        self.num_tokens = objs[0].spec.num_tokens
        self._layer_bytes = np.array([obj.spec.num_tokens * token_bytes for obj in objs], dtype=np.uint64)
        self._starts = np.array([obj.address for obj in objs], dtype=np.uint64)

    @classmethod
    def of(cls, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]], token_bytes: int) -> UniformChunks | None:
        """None where they are not."""
        size = objs[0].spec.num_tokens
        follow = all(end == start for (_, end), (start, _) in pairwise(ranges))
        alike = all(obj.spec.num_tokens == size for obj in objs[:-1]) and objs[-1].spec.num_tokens <= size
        return cls(objs, token_bytes) if follow and alike else None

    @property
    def layer_bytes(self) -> int:
        """Of one layer of a full chunk."""
        return int(self._layer_bytes[0])

    def groups(self, layers: range, most_bytes: int) -> Iterator[ChunkGroup]:
        """All of ``layers``, in ascending order, in groups of at most ``most_bytes`` or one layer of one chunk."""
        fit = max(1, most_bytes // self.layer_bytes)
        chunks = min(fit, len(self.objs))
        step = max(1, fit // chunks)
        for layer in range(layers.start, layers.stop, step):
            for chunk in range(0, len(self.objs), chunks):
                yield ChunkGroup(
                    range(chunk, min(chunk + chunks, len(self.objs))), range(layer, min(layer + step, layers.stop))
                )

    def whole_groups(self, layers: range, most_bytes: int) -> Iterator[ChunkGroup]:
        """All of ``layers``, in groups of whole chunks, of at most ``most_bytes`` or one chunk."""
        step = max(1, most_bytes // (len(layers) * self.layer_bytes))
        for chunk in range(0, len(self.objs), step):
            yield ChunkGroup(range(chunk, min(chunk + step, len(self.objs))), layers)

    def room(self, group: ChunkGroup) -> int:
        """Bytes that a group needs in a staging buffer."""
        return len(group.chunks) * len(group.layers) * self.layer_bytes

    def tokens_of(self, group: ChunkGroup) -> tuple[int, int]:
        """The first token of a group, counted from the first chunk's, and how many there are."""
        first = group.chunks.start * self.num_tokens
        return first, (len(group.chunks) - 1) * self.num_tokens + self.objs[group.chunks[-1]].spec.num_tokens

    def addresses(self, group: ChunkGroup, to: int) -> tuple[Addresses, Addresses, Addresses]:
        """Where each chunk's share of a group goes in a staging buffer at ``to``, where it lies, and its bytes."""
        of = slice(group.chunks.start, group.chunks.stop)
        room = np.uint64(len(group.layers) * self.layer_bytes)
        target = np.uint64(to) + np.arange(len(group.chunks), dtype=np.uint64) * room
        source = self._starts[of] + self._layer_bytes[of] * np.uint64(group.layers.start)
        return target, source, self._layer_bytes[of] * np.uint64(len(group.layers))

    def shares(self, group: ChunkGroup) -> list[torch.Tensor]:
        """Each chunk's share of a group, uint8, as it lies in its chunk."""
        each = self._layer_bytes.tolist()
        return [
            self.objs[chunk].bytes[group.layers.start * each[chunk] : group.layers.stop * each[chunk]]
            for chunk in group.chunks
        ]
