"""``RemoteTier``: KV in a store that many servers share."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar, TypeVar

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.observability.logging import init_logger, log_limited
from lmcache.storage.breaker import CircuitBreaker
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.interface import Allocate, StorageTier, TierStats
from lmcache.storage.remote.chunk_receiver import ChunkReceiver
from lmcache.storage.remote.interface import RemoteStore, RemoteStoreError, Value, Wanted
from lmcache.storage.remote.known_keys import KnownKeys
from lmcache.storage.remote.names import RemoteNames
from lmcache.storage.remote.other_sizes import OtherSizes
from lmcache.storage.remote.reads import Read, Reads
from lmcache.storage.remote.settings import RemoteSettings
from lmcache.storage.remote.uploads import Uploads

logger = init_logger(__name__)

T = TypeVar("T")

_KNOWN_KEYS = 1 << 18
LOOKUP_THREADS = 2
"""And one more for errands."""
_MAX_WAITING = 64


class RemoteTier(StorageTier):
    """Puts are written behind the caller's back; until then they are served from the host memory they wait in.

    Only what the store was seen to have is there: :meth:`ask` finds that out. What vanished from the store meanwhile
    is a miss when it is read. A store that fails several times in a row is left alone for a while, and everything is a
    miss until then. :meth:`clear` and :meth:`remove` are for everybody who uses the store.
    """

    name: ClassVar[str] = "remote"
    must_ask: ClassVar[bool] = True

    def __init__(
        self,
        store: RemoteStore,
        settings: RemoteSettings,
        allocate: Allocate,
        chunk_format: ChunkFormat | None = None,
        other_sizes: OtherSizes | None = None,
    ) -> None:
        """Takes over ``store``.

        Args:
            allocate: gives the host memory that chunks are read into.
            other_sizes: :meth:`ask` also finds out what these have of a chunk. They read it under their own keys.
        """
        self.store = store
        self.format = chunk_format or ChunkFormat()
        self.names = RemoteNames(self.format.tag, other_sizes=other_sizes)
        self._other_sizes = other_sizes
        self.breaker = CircuitBreaker()
        self._settings = settings
        self._allocate = allocate
        self._known = KnownKeys(settings.known_seconds, _KNOWN_KEYS)
        self._uploads = Uploads(settings.write_queue_bytes)
        self._reads = Reads(settings.read_threads)
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()
        self._waiting: Counter[ThreadPoolExecutor] = Counter()
        self._hits = self._misses = self._dropped = 0
        self._pid, self._closed = os.getpid(), False
        self._errands = ThreadPoolExecutor(1, thread_name_prefix="lmcache-remote-errand")
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="lmcache-remote-lookup")
        self._readers = ThreadPoolExecutor(settings.read_threads, thread_name_prefix="lmcache-remote-read")
        self._writers = [
            threading.Thread(target=self._write_all, name=f"lmcache-remote-write-{index}", daemon=True)
            for index in range(settings.write_threads)
        ]
        for writer in self._writers:
            writer.start()

    # Looking

    def contains(self, key: CacheKey) -> bool:
        return key in self._uploads or (key in self._known and self.breaker.allows())

    def ask(self, keys: Sequence[CacheKey]) -> Future[None] | None:
        unknown = [key for key in keys if not self._is_stored(key) and key not in self._uploads]
        if not unknown or not self.breaker.allows():
            return None
        return self.run_lookup(lambda: self._find_out(unknown, self._parts))

    def _is_stored(self, key: CacheKey) -> bool:
        """Whether the store was seen of late to have ``key``, or all that it can be made of."""
        return self._known.is_fresh(key) or any(all(map(self._known.is_fresh, parts)) for parts in self._parts(key))

    def _parts(self, key: CacheKey) -> list[list[CacheKey]]:
        return [] if self._other_sizes is None else self._other_sizes.parts(key)

    def run_lookup(self, look: Callable[[], None]) -> Future[None] | None:
        """Run ``look``, which asks the store something small that a request waits for, on a thread for that. None where
        too many wait."""
        return self._submit(self._lookups, look)

    def run_errand(self, errand: Callable[[], None]) -> Future[None] | None:
        """The same for what nobody waits for."""
        return self._submit(self._errands, errand)

    def _submit(self, pool: ThreadPoolExecutor, call: Callable[[], None]) -> Future[None] | None:
        with self._lock:
            if self._closed or self._waiting[pool] >= _MAX_WAITING:
                return None
            self._waiting[pool] += 1
        try:
            return pool.submit(self._run, pool, call)
        except RuntimeError:  # closed meanwhile
            return None

    def _run(self, pool: ThreadPoolExecutor, call: Callable[[], None]) -> None:
        try:
            call()
        finally:
            with self._lock:
                self._waiting[pool] -= 1

    def find_out(self, keys: Sequence[CacheKey]) -> None:
        """Ask the store for ``keys``, and wait for what it says."""
        self._find_out(keys, lambda _: [])

    def _find_out(self, keys: Sequence[CacheKey], parts_of: Callable[[CacheKey], list[list[CacheKey]]]) -> None:
        names, timeout = self.names, self._settings.lookup_timeout
        asked: list[CacheKey] = []

        def look() -> list[bool]:
            # Which sizes there are is known only now.
            asked.extend(keys)
            asked.extend(part for key in keys for parts in parts_of(key) for part in parts)
            return self.store.exists([names.of(key) for key in asked], timeout)

        nowhere: list[bool] = []
        there = self.attempt("lookup", look, nowhere)
        self._known.add(key for key, is_there in zip(asked, there, strict=False) if is_there)
        for key, is_there in zip(asked, there, strict=False):
            if not is_there:
                self._known.discard(key)

    # Getting

    def submit_get(self, key: CacheKey) -> Future[MemoryObj | None]:
        future: Future[MemoryObj | None] = Future()
        future.set_running_or_notify_cancel()
        if (waiting := self._uploads.get(key)) is not None:
            self._count(hits=1)
            future.set_result(waiting)
        elif self._closed or not self.contains(key):
            self._count(misses=1)
            future.set_result(None)
        elif self._reads.add(key, future):
            try:
                self._readers.submit(self._read_some)
            except RuntimeError:  # closed meanwhile
                self._reads.give_up()
        return future

    def _read_some(self) -> None:
        reads = self._reads.take()
        if not reads:
            return
        receivers = [ChunkReceiver(self.format, read.key, self._allocate) for read in reads]
        wanted = [Wanted(self.names.of(read.key), each) for read, each in zip(reads, receivers, strict=True)]
        try:
            self.attempt("read", lambda: self.store.get(wanted, self._settings.timeout), None)
        finally:
            for read, receiver in zip(reads, receivers, strict=True):
                self._read_ended(read, receiver)

    def _read_ended(self, read: Read, receiver: ChunkReceiver) -> None:
        obj = receiver.take()
        if obj is None:
            self._known.discard(read.key)
        else:
            self._known.add([read.key])
        if receiver.failure is not None:
            self._fail(f"read_{receiver.failure}", f"a chunk is not what it should be ({receiver.failure})")
        if receiver.is_damaged:
            self._delete(read.key)
        self._count(hits=int(obj is not None), misses=int(obj is None))
        self._reads.end(read, obj)

    # Putting

    def submit_put(self, key: CacheKey, obj: MemoryObj) -> bool:
        if self._is_stored(key):
            return True
        if not self._closed and self.breaker.allows() and self._uploads.add(key, obj):
            return True
        self._count(dropped=1)
        return False

    def _write_all(self) -> None:
        while burst := self._uploads.take():
            self._write_and_end(burst)

    def _write_and_end(self, burst: list[tuple[CacheKey, MemoryObj]]) -> None:
        try:
            self._write(burst)
        except Exception as error:
            self._count(dropped=len(burst))
            self._fail("write_internal", repr(error))
        finally:
            for key, _ in burst:
                self._uploads.end(key)

    def _write(self, burst: list[tuple[CacheKey, MemoryObj]]) -> None:
        timeout = self.timeout

        def claim() -> tuple[str, list[str], list[bool]]:
            # What chunks are called now is known only now.
            names = [self.names.of(key) for key, _ in burst]
            return self.names.generation, names, self.store.claim(names, 2 * timeout, timeout)

        nothing: tuple[str, list[str], list[bool]] = ("", [], [])
        generation, names, claimed = self.attempt("claim", claim, nothing)
        if not claimed:
            self._count(dropped=len(burst))
            return
        values = [
            Value(name, self.format.encode(key, obj))
            for name, (key, obj), mine in zip(names, burst, claimed, strict=True)
            if mine
        ]
        if values and not self.attempt("write", lambda: self._put(values), False):
            self._count(dropped=len(values))
            return
        self._leave_mark(burst)
        if generation != self.names.generation:  # forgotten while it was written
            return
        # Who claimed the others writes them, or has; if not, the next look-up finds out.
        self._known.add(key for (key, _), mine in zip(burst, claimed, strict=True) if mine)

    def _leave_mark(self, written: list[tuple[CacheKey, MemoryObj]]) -> None:
        sizes = self._other_sizes
        if sizes is None or not sizes.own_mark_is_missing:
            return
        if any(obj.spec.layout == TOKEN_MAJOR for _, obj in written):  # other chunks are neither cut nor joined
            self.attempt("mark", lambda: sizes.mark(self.store, self.timeout), None)

    def _put(self, values: list[Value]) -> bool:
        self.store.put(values, self.timeout)
        return True

    # Keeping

    def remove(self, key: CacheKey) -> bool:
        """Waits for the store."""
        if not (self._uploads.cancel(key) or self._known.discard(key)):
            return False
        self._delete(key)
        return True

    def _delete(self, key: CacheKey) -> None:
        self.attempt("delete", lambda: self.store.delete([self.names.of(key)], self._settings.lookup_timeout), None)

    def pin(self, key: CacheKey) -> bool:
        """The store evicts as it likes, so this promises nothing."""
        return self.contains(key)

    def unpin(self, key: CacheKey) -> None: ...

    def keys(self) -> list[CacheKey]:
        """Of those that were seen in the store of late."""
        return self._known.keys()

    def clear(self) -> int:
        self.names.forget()
        gone = self._uploads.cancel_all() + self._known.clear()
        # Tells the others soon, not at the next look-up.
        self.run_errand(lambda: self.attempt("clear", lambda: None, None))
        return gone

    def flush(self, timeout: float | None = None) -> bool:
        return self._uploads.wait(timeout)

    def stats(self) -> TierStats:
        """``entries`` are those seen of late; what the store holds altogether, and how much, it knows itself."""
        with self._lock:
            return TierStats(
                entries=len(self._known),
                used_bytes=0,
                capacity_bytes=0,
                hits=self._hits,
                misses=self._misses,
                evictions=0,
                dropped_puts=self._dropped,
                failures=dict(self._failures),
            )

    def close(self) -> None:
        # The threads stayed with the process that made them.
        if os.getpid() != self._pid or self._closed:
            return
        self._closed = True
        if not self._uploads.wait(self._settings.close_timeout):
            logger.warning("remote tier: closing with chunks not yet written; they are dropped")
        self._uploads.close()
        for writer in self._writers:
            writer.join()
        self._lookups.shutdown(cancel_futures=True)
        self._errands.shutdown()
        self._readers.shutdown()
        self.store.close()

    # Failing

    @property
    def timeout(self) -> float:
        """Seconds that a read or a write may take."""
        return self._settings.timeout

    def attempt(self, what: str, call: Callable[[], T], fallback: T) -> T:
        """What ``call`` gives; ``fallback`` where the store fails or is left alone. Never raises."""
        if not self.breaker.attempt():
            return fallback
        try:
            if self.names.is_due and self.names.refresh(self.store, self._settings.lookup_timeout):
                self._known.clear()
            result = call()
        except RemoteStoreError as error:
            if error.is_outage:
                self.breaker.failed()
            else:
                self.breaker.succeeded()
            self._fail(f"{what}_{error.reason}", str(error))
            return fallback
        except Exception as error:
            self.breaker.failed()
            self._fail(f"{what}_internal", repr(error))
            return fallback
        self.breaker.succeeded()
        return result

    def _fail(self, reason: str, detail: str) -> None:
        with self._lock:
            self._failures[reason] += 1
        log_limited(logger, logging.WARNING, f"remote:{reason}", "remote tier: %s: %s", reason, detail)

    def _count(self, *, hits: int = 0, misses: int = 0, dropped: int = 0) -> None:
        with self._lock:
            self._hits += hits
            self._misses += misses
            self._dropped += dropped
