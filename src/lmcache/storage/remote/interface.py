"""What a store outside this process must offer to hold KV. One conformance suite runs over all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class RemoteStoreError(Exception):
    """A store did not do what it was asked to.

    ``reason`` is a short word to count by, such as ``timeout``. ``is_outage`` is False where the store itself is well
    and would not take this one value (it is full, say): then there is no sense in leaving it alone for a while.
    """

    def __init__(self, reason: str, detail: str, *, is_outage: bool = True) -> None:
        super().__init__(detail)
        self.reason = reason
        self.is_outage = is_outage


class Receiver(ABC):
    """Takes in one value, straight into the memory where it is wanted."""

    head_bytes: int
    """How many of the first bytes decide what becomes of the rest."""

    @abstractmethod
    def begin(self, nbytes: int, head: memoryview) -> memoryview | None:
        """The value is there.

        Args:
            nbytes: length of the whole value.
            head: its first ``min(nbytes, head_bytes)`` bytes, valid during the call.

        Returns:
            Writable memory for all that follows the head, exactly as long; None if that is not wanted, or there is
            nothing.
        """

    @abstractmethod
    def finish(self) -> None:
        """The memory that :meth:`begin` gave has been filled; not called where it gave none."""


class Wanted(NamedTuple):
    """A value to be read, and who takes it."""

    name: str
    receiver: Receiver


class Value(NamedTuple):
    """A value to be written: its parts, one after the other."""

    name: str
    parts: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class StoreOptions:
    """What every store is given besides its URL.

    Attributes:
        connections: calls that may be under way at once.
        ttl_seconds: after this long without being written again a value may go; None: the store decides.
        extra: settings of one kind of store, from ``extra_config``.
    """

    connections: int = 8
    ttl_seconds: float | None = None
    extra: dict[str, object] | None = None


class RemoteStore(ABC):
    """Values by name, in batches. Blocking and thread-safe.

    Names are ASCII of letters, digits, ``/``, ``.``, ``_`` and ``-``, at most 200 characters. Values are of 1 byte up
    to gigabytes. Every call ends within about ``timeout`` seconds, and raises :class:`RemoteStoreError` for whatever
    goes wrong; nothing else. A value is seen whole or not at all. Values of names that were asked for in vain, or
    that vanish while being read, are no error.

    The constructor takes the URL and :class:`StoreOptions`. It raises ValueError for a URL that cannot be meant, and
    does not connect: a store that is away when a server starts may come later.
    """

    @abstractmethod
    def __init__(self, url: str, options: StoreOptions) -> None: ...

    @abstractmethod
    def exists(self, names: Sequence[str], timeout: float) -> list[bool]:
        """Which of ``names`` have a value."""

    @abstractmethod
    def get(self, wanted: Sequence[Wanted], timeout: float) -> None:
        """Hand each value that is there to its receiver, in any order, never two at once.

        Once this has returned or raised, nothing writes into memory that a receiver gave.
        """

    @abstractmethod
    def put(self, values: Sequence[Value], timeout: float) -> None:
        """Write values. One that is there may be replaced: equal names mean equal bytes, except for names that end
        in ``.latest``, of which the last put wins.

        After an error some may have been written, each of them whole.
        """

    @abstractmethod
    def delete(self, names: Sequence[str], timeout: float) -> None:
        """Remove values; names without one are ignored."""

    def claim(self, names: Sequence[str], seconds: float, timeout: float) -> list[bool]:
        """For which of ``names`` the caller is the one who should write the value: it is not there, and nobody else
        has claimed the name in the last ``seconds``. A store that cannot arbitrate says what is not there."""
        return [not there for there in self.exists(names, timeout)]

    @abstractmethod
    def close(self) -> None:
        """Give up connections. Idempotent; no call is made afterwards."""
