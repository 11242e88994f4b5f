"""What the tier holds and promises, in memory, under one lock and without any I/O.

A chunk is *queued*, then *being written* (both in the write queue), then an *entry*; at last it is *condemned*:
forgotten, its file still to be removed. The two ends meet in the space account: a put is admitted when it fits beside
everything that is not condemned, and it is handed out for writing only when nothing is condemned any more. So the files
on the disk are never more than what was promised.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj
from lmcache.storage.chunk_format import NO_KEY, ChunkFormat
from lmcache.storage.disk.chunk_file import PLAIN
from lmcache.storage.disk.direct_io import round_up
from lmcache.storage.disk.entries import EntryTable
from lmcache.storage.disk.index import ROWS_PER_COMMIT, IndexRow
from lmcache.storage.disk.packed import Packed
from lmcache.storage.disk.space import ENTRY_METADATA_BYTES, SpaceRules
from lmcache.storage.disk.work import Condemned, Read, Work
from lmcache.storage.disk.write_queue import Write, WriteQueue
from lmcache.storage.interface import TierStats
from lmcache.storage.policies.interface import EvictionPolicy


class Catalog:
    """Thread-safe. References to ``MemoryObj`` are given back outside the lock: that may call into a pool."""

    def __init__(
        self,
        rules: SpaceRules,
        policy: EvictionPolicy[CacheKey],
        write_queue_bytes: int,
        chunk_format: ChunkFormat = PLAIN,
    ) -> None:
        self._rules = rules
        self._format = chunk_format
        self._policy = policy
        self._changed = threading.Condition()
        self._closed = self._stopped = self._writer_busy = False

        self._entries = EntryTable(rules.charge)
        self._queue = WriteQueue(write_queue_bytes)
        # Entries that we have no key for. They are as good as not there, until room is needed or they are put anew.
        self._locked: set[CacheKey] = set()
        self._condemned: deque[Condemned] = deque()
        self._reads: dict[CacheKey, Read] = {}
        self._pins: Counter[CacheKey] = Counter()

        self._promised = 0  # charges of entries, queued and being written
        self._metadata_rows = 0
        self._next_file_id = 1
        self._clock = 0
        self._used: dict[int, int] = {}
        self._hits = self._misses = self._evictions = self._dropped = 0
        self._failures: Counter[str] = Counter()

    # Start

    def restore(self, rows: Iterable[IndexRow], *, next_file_id: int, last_use: int) -> None:
        """Take over what an earlier run left, coldest first."""
        with self._changed:
            self._next_file_id, self._clock = next_file_id, last_use
            for row in rows:
                # The removal of an earlier file of the same key may not have reached the index.
                if row.key in self._entries:
                    self._forget(row.key)
                self._entries.add(row.key, row.file_id, row.spec, row.packed)
                self._policy.insert(row.key)
                if self._format.refusal(row.key_id) == NO_KEY:
                    self._locked.add(row.key)
            self._promised = self._entries.charged

    def evict_to_limit(self, metadata_rows: int) -> None:
        """Condemn what is over the capacity of this run.

        Args:
            metadata_rows: how many entries' worth of metadata lies in the directory.
        """
        with self._changed:
            self._metadata_rows = metadata_rows
            while self._excess(rows=self._num_keys()) > 0 and self._evict_one():
                pass
            self._metadata_rows = max(metadata_rows, self._num_keys())

    def file_ids(self) -> npt.NDArray[np.int64]:
        with self._changed:
            return self._entries.file_ids()

    # The tier's side

    def __contains__(self, key: CacheKey) -> bool:
        # No lock: a chunk enters its next table before it leaves the last one, and is looked for in this order.
        return key in self._queue or (key in self._entries and key not in self._locked)

    @property
    def num_locked(self) -> int:
        """How many chunks there are whose key we do not have."""
        return len(self._locked)

    def admit(self, key: CacheKey, obj: MemoryObj) -> bool:
        """Queue ``obj`` for writing, evicting as it must. False, and nothing evicted, when it cannot be kept."""
        with self._changed:
            if not self._closed and key in self:
                self._touch(key)
                return True
            if key in self._locked and not self._closed:
                self._forget(key)
            most = self._format.max_payload(obj.spec)
            charge = self._rules.charge(most)
            if self._closed or not self._make_room(obj, charge):
                self._dropped += 1
                return False
            packed = None if self._format.is_plain else Packed(round_up(most), self._format.key_id)
            row = IndexRow(self._next_file_id, key, obj.spec, self._tick(), packed)
            self._next_file_id += 1
            self._queue.push(Write(row, obj.ref_up(), charge))
            self._promised += charge
            self._metadata_rows = max(self._metadata_rows, self._num_keys())
            self._policy.insert(key)
            self._changed.notify_all()
            return True

    def begin_read(self, key: CacheKey) -> tuple[Future[MemoryObj | None], Read | None]:
        """The caller's future, and the read to be carried out and given to :meth:`end_read`, if it takes a new one."""
        future: Future[MemoryObj | None] = Future()
        # Cannot be cancelled from now on: a cancelled future would lose the reference that is put into it.
        future.set_running_or_notify_cancel()
        with self._changed:
            write = self._queue.get(key)
            entry = self._entries.get(key) if key in self else None
            if self._closed or (write is None and entry is None):
                self._misses += 1
                future.set_result(None)
                return future, None
            self._touch(key)
            if write is not None:
                self._hits += 1
                future.set_result(write.obj.ref_up())
                return future, None
            assert entry is not None
            read, new = self._reads.get(key), None
            if read is None:
                read = new = self._reads[key] = Read(key, entry)
            read.futures.append(future)
            return future, new

    def end_read(self, read: Read, obj: MemoryObj | None, *, failure: str | None = None, forget: bool = False) -> None:
        """Give ``obj`` with its one reference, or a miss, to everyone who waits.

        Args:
            failure: what to count the miss by.
            forget: the file is no good: remove the entry.
        """
        with self._changed:
            if read.forgotten:
                self._condemn(read.entry.file_id, read.entry.charge)
            else:
                del self._reads[read.key]
                if forget:
                    self._forget(read.key)
            if failure is not None:
                self._failures[failure] += 1
            if obj is None:
                self._misses += len(read.futures)
            else:
                self._hits += len(read.futures)
        for future in read.futures:
            future.set_result(None if obj is None else obj.ref_up())
        if obj is not None:
            obj.ref_down()

    def remove(self, key: CacheKey) -> bool:
        cancelled = None
        with self._changed:
            if key not in self or key in self._pins:
                return False
            if key in self._entries:
                self._forget(key)
            else:
                cancelled = self._cancel(key)
        if cancelled is not None:
            cancelled.obj.ref_down()
        return True

    def pin(self, key: CacheKey) -> bool:
        with self._changed:
            if self._closed or key not in self:
                return False
            self._pins[key] += 1
            return True

    def unpin(self, key: CacheKey) -> None:
        with self._changed:
            if self._pins[key] <= 1:
                del self._pins[key]
            else:
                self._pins[key] -= 1

    def keys(self) -> list[CacheKey]:
        with self._changed:
            return [key for key in self._policy if key not in self._locked]

    def clear(self) -> int:
        with self._changed:
            free = [key for key in self._policy if self._is_evictable(key)]
            for key in free:
                self._forget(key)
            return len(free)

    def drop(self) -> None:
        """Count a put that was not even tried."""
        with self._changed:
            self._dropped += 1

    def stats(self) -> TierStats:
        with self._changed:
            return TierStats(
                entries=self._num_keys(),
                used_bytes=self._promised,
                capacity_bytes=self._rules.limit,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                dropped_puts=self._dropped,
                failures=dict(self._failures),
            )

    def flush(self, timeout: float | None) -> bool:
        """Wait until nothing is queued, being written or condemned."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._has_work() or self._writer_busy), timeout)

    def close(self) -> bool:
        """Accept nothing more; False when that was already so."""
        with self._changed:
            first, self._closed = not self._closed, True
            return first

    def stop(self) -> None:
        """Drop what is queued and send the writer home."""
        with self._changed:
            dropped = self._queue.waiting
            for write in dropped:
                self._drop(write)
            self._stopped = True
            self._changed.notify_all()
        for write in dropped:
            write.obj.ref_down()

    # The writer's side

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def stopped(self) -> bool:
        return self._stopped

    def take_work(self, timeout: float, *, busy: bool = False) -> Work | None:
        """Wait for something to do, at most ``timeout`` seconds; None when the tier closes.

        Args:
            busy: the writer has not finished all of what it took before.
        """
        with self._changed:
            self._writer_busy = busy
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_work() or self._stopped, timeout)
            if self._has_work():
                self._writer_busy = True
            elif self._stopped:
                return None
            if self._condemned:
                count = min(len(self._condemned), ROWS_PER_COMMIT)
                return Work(condemned=[self._condemned.popleft() for _ in range(count)])
            return Work(writes=self._queue.take_burst())

    def take_used(self, count: int) -> dict[int, int]:
        """Times of last use that the index does not know yet, by file number; at most ``count``."""
        with self._changed:
            return dict(self._used.popitem() for _ in range(min(count, len(self._used))))

    @property
    def has_used(self) -> bool:
        return bool(self._used)

    def end_writes(self, done: Iterable[Write], failed: Iterable[Write]) -> None:
        """The burst is over: ``done`` are entries now, ``failed`` are forgotten and their files condemned."""
        done, failed = list(done), list(failed)
        with self._changed:
            for write in done:
                if write.cancelled:
                    self._condemn(write.row.file_id, write.charge)
                else:
                    charge = self._entries.add(write.key, write.row.file_id, write.row.spec, write.packed)
                    self._promised -= write.charge - charge
                self._queue.end(write)
            for write in failed:
                self._condemn(write.row.file_id, write.charge)
                if not write.cancelled:
                    self._policy.remove(write.key)
                    self._pins.pop(write.key, None)
                    self._dropped += 1
                self._queue.end(write)
            self._changed.notify_all()
        for write in (*done, *failed):
            write.obj.ref_down()

    def could_not_unlink(self, condemned: Condemned) -> None:
        """Its file is still there and so counts on. Drops the newest puts that relied on its space."""
        dropped = []
        with self._changed:
            self._promised += condemned.charge
            for write in reversed(self._queue.waiting):
                if self._excess() <= 0:
                    break
                self._drop(write)
                dropped.append(write)
        for write in dropped:
            write.obj.ref_down()

    def failed(self, reason: str, count: int = 1) -> None:
        with self._changed:
            self._failures[reason] += count

    # Under the lock

    def _num_keys(self) -> int:
        return len(self._entries) + len(self._queue)

    def _has_work(self) -> bool:
        return bool(self._condemned) or not self._queue.is_idle

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _touch(self, key: CacheKey) -> None:
        self._policy.touch(key)
        tick = self._tick()
        write = self._queue.get(key)
        if write is not None:
            write.row = write.row._replace(last_use=tick)
            # Its row may have been committed with the earlier time already, and may not yet be there to be updated.
            self._used[write.row.file_id] = tick
        elif (entry := self._entries.get(key)) is not None:
            self._used[entry.file_id] = tick

    def _excess(self, charge: int = 0, rows: int = 0) -> int:
        """By how many bytes the limit would be passed with one more chunk."""
        metadata = max(self._metadata_rows, rows) * ENTRY_METADATA_BYTES
        return self._promised + charge + metadata - self._rules.limit

    def _make_room(self, obj: MemoryObj, charge: int) -> bool:
        if not self._queue.has_room(obj):
            return False
        if self._excess(charge, self._num_keys() + 1) <= 0:
            return True
        # Before anything goes: would it be enough? At least one must go, hence the 1 and no row more than now.
        held = {entry for key in (*self._pins, *self._reads) if (entry := self._entries.get(key)) is not None}
        evictable = self._entries.charged - sum(entry.charge for entry in held)
        if max(1, self._excess(charge, self._num_keys())) > evictable:
            return False
        while self._excess(charge, self._num_keys() + 1) > 0:
            if not self._evict_one():
                return False
        return True

    def _is_evictable(self, key: CacheKey) -> bool:
        return key in self._entries and key not in self._pins and key not in self._reads

    def _evict_one(self) -> bool:
        victim = self._policy.victim(self._is_evictable)
        if victim is not None:
            self._forget(victim)
            self._evictions += 1
        return victim is not None

    def _forget(self, key: CacheKey) -> None:
        entry = self._entries.pop(key)
        if entry is None:
            return
        self._policy.remove(key)
        self._pins.pop(key, None)
        self._locked.discard(key)
        self._used.pop(entry.file_id, None)
        read = self._reads.pop(key, None)
        if read is None:
            self._condemn(entry.file_id, entry.charge)
        else:
            read.forgotten = True  # the file goes, and frees its space, when the read is over

    def _condemn(self, file_id: int, charge: int) -> None:
        self._promised -= charge
        self._condemned.append(Condemned(file_id, charge))
        self._changed.notify_all()

    def _cancel(self, key: CacheKey) -> Write | None:
        """Forget a chunk that is not written yet. The caller gives the reference of the write back, if there is one."""
        self._policy.remove(key)
        self._pins.pop(key, None)
        write = self._queue.cancel(key)
        if write is not None:
            self._promised -= write.charge
        return write

    def _drop(self, write: Write) -> None:
        self._cancel(write.key)
        self._dropped += 1
