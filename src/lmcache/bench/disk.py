"""The disk tier against the disk: how much of the raw O_DIRECT rate is left.

Raw means: as many threads, one file a chunk, one aligned ``pwrite`` or ``pread``, nothing else. Within a run the same
bytes are written and read raw and through the tier right after each other, because disks change their mind from minute
to minute. The tier keeps its directory from run to run, as a server does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lmcache.bench.rows import CannotMeasureError, Row
from lmcache.bench.settings import Settings
from lmcache.bench.shapes import CHUNK_SIZE, LLAMA_8B, SMOLLM2, ModelShape
from lmcache.bench.timing import Work, median, share, take_turns
from lmcache.keys import KEY_BYTES, PrefixKey
from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.disk import DiskSettings, LocalDiskTier
from lmcache.storage.disk.direct_io import O_DIRECT, read_all, supports_direct_io, write_all
from lmcache.storage.policies import make_policy

SHAPES = (SMOLLM2, LLAMA_8B)
MIN_SHARE = 0.85
READ_WINDOW = 8
"""Reads that a request keeps under way."""
SOURCES = 4
"""Different chunks that are written in turn."""


def measure_disk(settings: Settings) -> list[Row]:
    """Raises:
    CannotMeasureError: the file system of ``settings.directory`` refuses O_DIRECT; its rates would be those of the
        page cache.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=settings.directory, prefix="lmcache-bench-") as name:
        if not supports_direct_io(Path(name)):
            raise CannotMeasureError(f"{settings.directory} refuses O_DIRECT; name a directory on a local disk")
        for shape in SHAPES:
            rows += _measure_shape(shape, Path(name), settings)
    return rows


def _measure_shape(shape: ModelShape, directory: Path, settings: Settings) -> list[Row]:
    count = max(READ_WINDOW, shape.num_chunks(settings.disk_bytes))
    kv = directory / "tier"
    disk = DiskSettings(kv, capacity_bytes=2 * count * shape.chunk_bytes + (64 << 20), write_queue_bytes=1 << 40)
    pool = SlabAllocator((SOURCES + disk.read_threads + 2 * READ_WINDOW) * (shape.chunk_bytes + 4096), pin_memory=False)
    spec = KVSpec(shape.metadata.kv_shape, shape.dtype, TOKEN_MAJOR, CHUNK_SIZE)
    allocated = [pool.allocate(spec) for _ in range(SOURCES + disk.read_threads)]
    objects = [obj for obj in allocated if obj is not None]
    for obj in objects:
        obj.padded_bytes.random_(0, 256)
    chunks = objects[:SOURCES]
    raw = _RawFiles(directory / "raw", chunks, objects[SOURCES:], count, disk.write_threads)
    tier = LocalDiskTier(disk, pool.allocate, make_policy("LRU"))

    def forget() -> None:
        tier.clear()
        tier.flush()

    try:
        # Both sides write new files in every run; what the last run wrote is then read.
        taken = take_turns(
            {
                "raw write": Work(raw.write, before=raw.remove),
                "write": Work(lambda: put_all(tier, chunks, count), before=forget),
            },
            settings.runs,
        )
        taken |= take_turns({"raw read": Work(raw.read), "read": Work(lambda: get_all(tier, count))}, settings.runs)
        if failures := tier.stats().failures:
            raise RuntimeError(f"the disk tier failed: {failures}")
    finally:
        tier.close()
        raw.remove()
        shutil.rmtree(kv)
        for obj in objects:
            obj.ref_down()
        pool.close()
    payload = count * spec.nbytes / 1e9
    return [
        Row(
            subject="disk",
            figure=figure,
            case=f"{shape}, {count} chunks of {spec.nbytes / 1e6:.1f} MB",
            unit="GB/s",
            value=payload / median(taken[figure]),
            baseline="O_DIRECT, one file a chunk",
            raw=payload / median(taken[f"raw {figure}"]),
            share=share(taken[figure], taken[f"raw {figure}"]),
            min_share=MIN_SHARE,
        )
        for figure in ("write", "read")
    ]


def _key(number: int) -> PrefixKey:
    return PrefixKey(number.to_bytes(KEY_BYTES, "little"))


def put_all(tier: LocalDiskTier, chunks: Sequence[MemoryObj], count: int) -> None:
    """Write ``count`` chunks, those of ``chunks`` in turn."""
    for number in range(count):
        if not tier.submit_put(_key(number), chunks[number % len(chunks)]):
            raise RuntimeError("the disk tier would not take a chunk")
    tier.flush()


def get_all(tier: LocalDiskTier, count: int) -> None:
    """Read what :func:`put_all` has written, as a request reads its chunks."""
    under_way: deque[Future[MemoryObj | None]] = deque()
    for number in range(count):
        under_way.append(tier.submit_get(_key(number)))
        if len(under_way) == READ_WINDOW:
            _arrived(under_way.popleft())
    for future in under_way:
        _arrived(future)


def _arrived(future: Future[MemoryObj | None]) -> None:
    obj = future.result()
    if obj is None:
        raise RuntimeError("the disk tier lost a chunk")
    obj.ref_down()


class _RawFiles:
    """The same number of chunks in files of their own, moved by as many threads as the tier has."""

    def __init__(
        self,
        directory: Path,
        sources: Sequence[MemoryObj],
        targets: Sequence[MemoryObj],
        count: int,
        write_threads: int,
    ) -> None:
        """Reads on as many threads as there are ``targets``."""
        self._directory = directory
        self._numbers = range(count)
        self._sources = [obj.padded_bytes.numpy().data for obj in sources]
        self._targets = deque(obj.padded_bytes.numpy().data for obj in targets)
        self._write_threads, self._read_threads = write_threads, len(targets)

    def write(self) -> None:
        self._directory.mkdir()
        self._each(self._write_one, self._write_threads)

    def read(self) -> None:
        self._each(self._read_one, self._read_threads)

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _each(self, move: Callable[[int], None], threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(move, self._numbers))

    def _write_one(self, number: int) -> None:
        fd = os.open(self._directory / str(number), os.O_WRONLY | os.O_CREAT | O_DIRECT)
        write_all(fd, [self._sources[number % len(self._sources)]])
        os.close(fd)

    def _read_one(self, number: int) -> None:
        target = self._targets.popleft()
        fd = os.open(self._directory / str(number), os.O_RDONLY | O_DIRECT)
        read_all(fd, [target])
        os.close(fd)
        self._targets.append(target)
