"""``mooncake://master:port``: the memory of many machines as one pool, by Mooncake Store.

https://github.com/kvcache-ai/Mooncake. Parameters of the URL: ``segment`` (bytes of this machine's memory that it adds
to the pool, default 1 GiB), ``buffer`` (bytes for values on their way, default 512 MiB), ``metadata`` (default
``P2PHANDSHAKE``, which needs no metadata server), ``protocol`` (``tcp`` or ``rdma``), ``device`` (names of RDMA
devices), ``hostname`` (what others reach this machine by; default: its address towards the master).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from operator import methodcaller
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mooncake.store import MooncakeDistributedStore

from lmcache.storage.remote.interface import RemoteStore, RemoteStoreError, StoreOptions, Value, Wanted

_SETTINGS = {"segment", "buffer", "metadata", "protocol", "device", "hostname"}
_LATEST = ".latest"
_PROBE_SECONDS = 1.0
# Mooncake's own numbers for its errors (ErrorCode in types.h).
_NOT_THERE = {-704, -703, -705}
_FULL = {-200, -10, -11}


class MooncakeStore(RemoteStore):
    """The client library moves values into a buffer of its own, from which they are copied once.

    Its calls cannot be interrupted, and run on threads of their own: one that takes too long is waited for no longer.
    Only the master decides what is evicted. Two that write a value at once may both send it.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        parts = urlsplit(url)
        given = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if unknown := sorted(given.keys() - _SETTINGS):
            raise ValueError(f"remote_url={url!r}: mooncake:// has no setting {', '.join(unknown)}")
        if not parts.hostname or parts.port is None:
            raise ValueError(f"remote_url={url!r}: must be mooncake://master:port")
        if options.ttl_seconds is not None:
            raise ValueError("remote_ttl_seconds: Mooncake has none; its master evicts")
        self._master = f"{parts.hostname}:{parts.port}"
        self._hostname = given.get("hostname")
        self._metadata = given.get("metadata", "P2PHANDSHAKE")
        self._protocol, self._device = given.get("protocol", "tcp"), given.get("device", "")
        try:
            self._segment, self._buffer = int(given.get("segment", 1 << 30)), int(given.get("buffer", 512 << 20))
        except ValueError:
            raise ValueError(f"remote_url={url!r}: segment and buffer are numbers of bytes") from None
        self._lock = threading.Lock()
        self._store: Any | None = None
        self._calls = ThreadPoolExecutor(options.connections, thread_name_prefix="lmcache-mooncake")

    def exists(self, names: Sequence[str], timeout: float) -> list[bool]:
        found = self._call(methodcaller("batch_is_exist", list(names)), timeout) if names else []
        if any(each < 0 for each in found):
            raise RemoteStoreError("lookup", f"the master answered {min(found)}")
        return [each == 1 for each in found]

    def get(self, wanted: Sequence[Wanted], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for name, receiver in wanted:
            held = self._call(methodcaller("get_buffer", name), deadline - time.monotonic())
            if held is None:
                continue
            # The handle keeps the buffer until it goes.
            data = memoryview(held).cast("B")
            head = data[: receiver.head_bytes]
            memory = receiver.begin(data.nbytes, head)
            if memory is not None:
                memory[:] = data[head.nbytes :]
                receiver.finish()

    def put(self, values: Sequence[Value], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for name, parts in values:
            write = "upsert_parts" if name.endswith(_LATEST) else "put_parts"
            call = methodcaller(write, name, *(part for part in parts if part.nbytes))
            code = self._call(call, deadline - time.monotonic())
            if code:
                raise RemoteStoreError(
                    "full" if code in _FULL else "put", f"Mooncake answered {code}", is_outage=code not in _FULL
                )

    def delete(self, names: Sequence[str], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for name in names:
            # What was read of late has a lease, which would keep it.
            code = self._call(methodcaller("remove", name, True), deadline - time.monotonic())
            if code and code not in _NOT_THERE:
                raise RemoteStoreError("delete", f"Mooncake answered {code}", is_outage=False)

    def close(self) -> None:
        self._calls.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def _call(self, call: Callable[[Any], Any], timeout: float) -> Any:
        with _as_store_errors():
            waiting = self._calls.submit(lambda: call(self._connected()))
            return waiting.result(max(0.0, timeout))

    def _connected(self) -> Any:
        with self._lock:
            if self._store is None:
                # The library waits for a master that is away for a minute and a half, and lets no Python run meanwhile.
                host, _, port = self._master.rpartition(":")
                socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS).close()
                store = MooncakeDistributedStore()
                code = store.setup(
                    self._hostname or _address_towards(self._master),
                    self._metadata,
                    self._segment,
                    self._buffer,
                    self._protocol,
                    self._device,
                    self._master,
                )
                if code:
                    raise RemoteStoreError("connection", f"no connection to Mooncake's master {self._master} ({code})")
                self._store = store
            return self._store


def _address_towards(master: str) -> str:
    """This machine's address on the way to the master."""
    host, _, port = master.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        address: str = probe.getsockname()[0]
        return address


@contextlib.contextmanager
def _as_store_errors() -> Iterator[None]:
    try:
        yield
    except RemoteStoreError:
        raise
    except FutureTimeoutError as error:
        raise RemoteStoreError("timeout", "Mooncake did not answer in time") from error
    except OSError as error:
        raise RemoteStoreError("connection", str(error)) from error
    except Exception as error:
        raise RemoteStoreError("error", repr(error)) from error
