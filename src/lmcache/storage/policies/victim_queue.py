"""The queue that the policies are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

RECHECK = 32
"""How many of the keys set aside a search looks at again."""


class VictimQueue(Generic[K]):
    """Keys, coldest first, that are searched for one that may go.

    Keys that a search had to pass over are set aside, still ahead of all others, so that the next search does not walk
    over a long run of pinned entries again: it looks at no more than :data:`RECHECK` of them. Only ``everywhere=True``
    looks at all of them, for a caller that has found nothing else.
    """

    def __init__(self) -> None:
        self._aside: OrderedDict[K, None] = OrderedDict()
        self._queue: OrderedDict[K, None] = OrderedDict()

    def push(self, key: K) -> None:
        """Put ``key`` at the hot end, wherever it was."""
        self._aside.pop(key, None)
        self._queue[key] = None
        self._queue.move_to_end(key)

    def discard(self, key: K) -> None:
        self._queue.pop(key, None)
        self._aside.pop(key, None)

    def search(self, evictable: Callable[[K], bool], *, everywhere: bool = False) -> K | None:
        """The coldest key that may go; None when the search found none."""
        again = list(self._aside if everywhere else islice(self._aside, RECHECK))
        for key in again:
            if evictable(key):
                return key
        if len(self._aside) > len(again):
            # Take turns, so that each of them is looked at again in time.
            for key in again:
                self._aside.move_to_end(key)
        while self._queue:
            key = next(iter(self._queue))
            if evictable(key):
                return key
            del self._queue[key]
            self._aside[key] = None
        return None

    def __contains__(self, key: object) -> bool:
        return key in self._queue or key in self._aside

    def __iter__(self) -> Iterator[K]:
        yield from self._aside
        yield from self._queue

    def __len__(self) -> int:
        return len(self._aside) + len(self._queue)
