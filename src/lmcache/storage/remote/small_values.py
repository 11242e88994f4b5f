"""Values that are small and of which all is wanted."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.storage.remote.interface import Receiver, RemoteStore, Value, Wanted


class _Small(Receiver):
    def __init__(self, max_bytes: int) -> None:
        self.head_bytes = max_bytes
        self.value: bytes | None = None

    def begin(self, nbytes: int, head: memoryview) -> memoryview | None:
        if nbytes <= self.head_bytes:
            self.value = bytes(head)
        return None

    def finish(self) -> None: ...


def read_small(store: RemoteStore, names: Sequence[str], max_bytes: int, timeout: float) -> list[bytes | None]:
    """The values of ``names``; None for one that is not there or is longer than ``max_bytes``.

    Raises:
        RemoteStoreError: the store failed.
    """
    receivers = [_Small(max_bytes) for _ in names]
    store.get(list(map(Wanted, names, receivers)), timeout)
    return [receiver.value for receiver in receivers]


def write_small(store: RemoteStore, values: Sequence[tuple[str, bytes]], timeout: float) -> None:
    """Put values by name.

    Raises:
        RemoteStoreError: the store failed; some may have been written.
    """
    store.put([Value(name, (memoryview(value),)) for name, value in values], timeout)
