"""Which entry goes when room is needed. One conformance suite runs over all policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import ClassVar, Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class EvictionPolicy(ABC, Generic[K]):
    """The order of entries. Knows keys only, holds no data, is guarded by its tier's lock."""

    name: ClassVar[str]

    @abstractmethod
    def insert(self, key: K) -> None:
        """A new entry. A key that is already known counts as :meth:`touch`."""

    @abstractmethod
    def touch(self, key: K) -> None:
        """The entry was used. Unknown keys are ignored."""

    @abstractmethod
    def remove(self, key: K) -> None:
        """The entry is gone, for whatever reason. Unknown keys are ignored."""

    @abstractmethod
    def victim(self, evictable: Callable[[K], bool]) -> K | None:
        """The entry to evict next among those that ``evictable`` allows; None when there is none.

        Does not remove it: the caller evicts, then calls :meth:`remove`. Entries passed over keep their place.
        """

    @abstractmethod
    def __iter__(self) -> Iterator[K]:
        """Every key, coldest first."""

    @abstractmethod
    def __len__(self) -> int: ...
