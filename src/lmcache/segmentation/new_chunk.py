"""What an index of passages is told of a chunk."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(frozen=True, eq=False)
class NewChunk(Generic[KeyT]):
    """A chunk to be noted.

    ``tokens``: at most ``chunk_size`` token ids; fewer where a prompt ends. ``start``: position of the first in its
    prompt. ``before``: key of the chunk that stood before it there. ``namespace``: what keeps it apart from others.
    ``seams``: counted from its first token.
    """

    key: KeyT
    tokens: npt.NDArray[np.uint32]
    start: int
    before: KeyT | None = None
    namespace: bytes = b""
    seams: Collection[int] = ()
