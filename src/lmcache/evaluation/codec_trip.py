"""What a codec does to KV that is kept: there and back, as a store or a disk would do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from lmcache.blend.segment_store import StoredSegment
from lmcache.evaluation.errors import EvaluationError
from lmcache.memory.memory_obj import KVSpec
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.codecs.interface import Codec

CHUNK_TOKENS: Final = 256
"""What is packed together, as ``chunk_size`` is by default."""


@dataclass
class Trip:
    """What all trips so far came to. Sums of squares are of float64."""

    raw_bytes: int = 0
    packed_bytes: int = 0
    squared_error: float = 0.0
    squared: float = 0.0

    @property
    def ratio(self) -> float:
        """Raw bytes over packed ones; 1 where nothing was packed."""
        return self.raw_bytes / self.packed_bytes if self.packed_bytes else 1.0

    @property
    def error(self) -> float:
        """Root mean square of the error over that of the numbers."""
        return float((self.squared_error / self.squared) ** 0.5) if self.squared else 0.0


class KeptKV:
    """The KV of a passage as it was computed, and the way back to it."""

    def __init__(self, segment: StoredSegment) -> None:
        """Raises:
        EvaluationError: its layers differ, as those of no chunk do.
        """
        self._rooms = [segment.layer(layer) for layer in range(segment.num_layers)]
        if len({room.shape for pair in self._rooms for room in pair}) != 1:
            raise EvaluationError("codecs are for models whose layers all have keys and values of one shape")
        self._kv = torch.stack([torch.stack(pair) for pair in self._rooms])  # [layers, 2, tokens, heads, dim]

    def pass_through(self, codec: Codec, trip: Trip) -> None:
        """Put into the cache what ``codec`` makes of it, chunk by chunk; what it does not take stays as it is."""
        back = self._kv.clone()
        for start in range(0, self._kv.shape[2], CHUNK_TOKENS):
            chunk = self._kv[:, :, start : start + CHUNK_TOKENS].contiguous()
            spec = KVSpec(tuple(chunk.shape), chunk.dtype, TOKEN_MAJOR, chunk.shape[2])
            packed = codec.encode(chunk, spec) if codec.takes(spec) else None
            if packed is not None:
                found = torch.empty_like(chunk)
                codec.decode(memoryview(packed), found, spec)
                back[:, :, start : start + CHUNK_TOKENS] = found
            trip.raw_bytes += spec.nbytes
            trip.packed_bytes += spec.nbytes if packed is None else len(packed)
        trip.squared_error += float((back.double() - self._kv.double()).pow(2).sum())
        trip.squared += float(self._kv.double().pow(2).sum())
        for layer, pair in enumerate(self._rooms):
            for room, numbers in zip(pair, back[layer], strict=True):
                room.copy_(numbers)
