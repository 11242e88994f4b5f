"""The disk tier against the disk: how much of the raw O_DIRECT rate is left, and what an index of a size costs.

    python benchmarks/disk.py                      both tables, in a temporary directory below the current one
    python benchmarks/disk.py --directory /mnt/nvme/scratch --total-mb 4096 --runs 7

Every run writes and reads the same bytes raw and through the tier, right after each other, because disks change their
mind from minute to minute; the table has medians, and the ratio is the median of each run's own ratio. Raw means: the
same number of threads, one file per chunk, one ``pwrite`` of an aligned buffer, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lmcache.keys import CacheKey, PrefixKey
from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.disk import DiskSettings, LocalDiskTier
from lmcache.storage.disk.direct_io import O_DIRECT, read_all, supports_direct_io, write_all
from lmcache.storage.disk.index import DiskIndex, IndexRow
from lmcache.storage.policies.lru import LRUPolicy

MODELS = {
    "SmolLM2-135M": KVSpec((30, 2, 256, 3, 64), torch.bfloat16, "token-major-1", 256),
    "Llama-3.1-8B": KVSpec((32, 2, 256, 8, 128), torch.bfloat16, "token-major-1", 256),
}
READ_WINDOW = 8
"""Reads that a request keeps under way."""


def make_key(number: int) -> PrefixKey:
    return PrefixKey(number.to_bytes(48, "little"))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Throughput:
    """One size of chunk in one directory. Rates are in bytes of payload a second."""

    def __init__(self, directory: Path, spec: KVSpec, count: int, threads: tuple[int, int], fsync: bool) -> None:
        self.directory = directory
        self.spec = spec
        self.count = count
        self.write_threads, self.read_threads = threads
        self.fsync = fsync
        self.pool = SlabAllocator((2 * READ_WINDOW + 4) * (spec.nbytes + 4096))
        self.sources = [self._source() for _ in range(4)]
        settings = DiskSettings(
            directory / f"kv-{spec.nbytes}",
            capacity_bytes=2 * count * spec.nbytes + (64 << 20),
            fsync=fsync,
            read_threads=self.read_threads,
            write_threads=self.write_threads,
            write_queue_bytes=1 << 40,
        )
        self.tier = LocalDiskTier(settings, self.pool.allocate, LRUPolicy())

    def _source(self) -> MemoryObj:
        obj = self.pool.allocate(self.spec)
        assert obj is not None
        obj.padded_bytes.random_(0, 256)
        return obj

    def run(self) -> dict[str, float]:
        """Raw and tier, write and read. The tier keeps its directory from run to run, as a server does."""
        payload = self.count * self.spec.nbytes
        raw = self.directory / "raw"
        raw.mkdir()
        rates = {"raw write": payload / timed(lambda: self._raw(raw, self._raw_write, self.write_threads))}
        rates["tier write"] = payload / timed(self._put_all)
        rates["raw read"] = payload / timed(lambda: self._raw(raw, self._raw_read, self.read_threads))
        rates["tier read"] = payload / timed(self._get_all)
        assert self.tier.clear() == self.count
        assert self.tier.flush()
        shutil.rmtree(raw)
        return rates

    def close(self) -> None:
        assert not self.tier.stats().failures, self.tier.stats()
        self.tier.close()

    def _put_all(self) -> None:
        for number in range(self.count):
            assert self.tier.submit_put(make_key(number), self.sources[number % len(self.sources)])
        assert self.tier.flush()

    def _get_all(self) -> None:
        under_way: deque[Future[MemoryObj | None]] = deque()
        for number in range(self.count):
            under_way.append(self.tier.submit_get(make_key(number)))
            if len(under_way) == READ_WINDOW:
                self._finish(under_way.popleft())
        for future in under_way:
            self._finish(future)

    def _finish(self, future: Future[MemoryObj | None]) -> None:
        obj = future.result()
        assert obj is not None
        obj.ref_down()

    def _raw(self, directory: Path, one: Callable[[Path, MemoryObj], None], threads: int) -> None:
        objects = deque(self.pool.allocate(self.spec) or self.sources[0] for _ in range(threads))

        def work(number: int) -> None:
            obj = objects.popleft()
            one(directory / str(number), obj)
            objects.append(obj)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(self.count)))
        for obj in objects:
            obj.ref_down()

    def _raw_write(self, path: Path, obj: MemoryObj) -> None:
        source = self.sources[0]
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | O_DIRECT)
        write_all(fd, [source.padded_bytes.numpy().data])
        if self.fsync:
            os.fdatasync(fd)
        os.close(fd)

    def _raw_read(self, path: Path, obj: MemoryObj) -> None:
        fd = os.open(path, os.O_RDONLY | O_DIRECT)
        read_all(fd, [obj.padded_bytes.numpy().data])
        os.close(fd)


def throughput_table(directory: Path, total_bytes: int, runs: int, threads: tuple[int, int], fsync: bool) -> Table:
    table = Table(title=f"Disk tier against raw O_DIRECT, GB/s, median of {runs}, {threads} write/read threads")
    for column in ("chunk of 256 tokens", "MB", "chunks", "", "raw", "tier", "ratio", "ratios of the runs"):
        table.add_column(column, justify="right")
    for model, spec in MODELS.items():
        bench = Throughput(directory, spec, max(8, total_bytes // spec.nbytes), threads, fsync)
        bench.run()  # warms up host memory and the disk
        results = [bench.run() for _ in range(runs)]
        bench.close()
        for what in ("write", "read"):
            raw = [result[f"raw {what}"] for result in results]
            tier = [result[f"tier {what}"] for result in results]
            ratios = sorted(t / r for t, r in zip(tier, raw, strict=True))
            table.add_row(
                model,
                f"{spec.nbytes / 1e6:.1f}",
                str(bench.count),
                what,
                f"{statistics.median(raw) / 1e9:.2f}",
                f"{statistics.median(tier) / 1e9:.2f}",
                f"{statistics.median(ratios):.0%}",
                f"{ratios[0]:.0%} … {ratios[-1]:.0%}",
            )
    return table


def fill_index(directory: Path, entries: int) -> None:
    """Rows alone: a start does not look at the files."""
    directory.mkdir()
    index = DiskIndex(directory)
    spec = MODELS["SmolLM2-135M"]

    def random_key() -> CacheKey:
        return PrefixKey(os.urandom(48))

    for start in range(0, entries, 10_000):
        numbers: Iterable[int] = range(start + 1, min(start + 10_000, entries) + 1)
        rows = [IndexRow(number, random_key(), spec, number) for number in numbers]
        index.commit(begun=rows, finished=[row.file_id for row in rows])
    index.close()


def measure_start(directory: Path) -> dict[str, float]:
    """In a process of its own: seconds to construct, resident bytes, microseconds of a lookup of 128 chunks."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    start = time.perf_counter()
    tier = LocalDiskTier(DiskSettings(directory, 1 << 50), lambda spec: None, LRUPolicy())
    seconds = time.perf_counter() - start
    grown = resident() - before
    keys = list(tier.keys())[:: max(1, len(tier.keys()) // 128)][:128]
    lookup = min(timed(lambda: all(tier.contains(key) for key in keys)) for _ in range(50))
    found = len(tier.keys())
    tier.close()
    return {"seconds": seconds, "resident": grown, "lookup": lookup, "entries": found}


def start_table(directory: Path, sizes: list[int]) -> Table:
    table = Table(title="Starting on an index")
    for column in ("entries", "index MB", "seconds to start", "bytes of memory an entry", "lookup of 32k tokens, µs"):
        table.add_column(column, justify="right")
    for entries in sizes:
        kv = directory / f"index-{entries}"
        fill_index(kv, entries)
        megabytes = (kv / "index.db").stat().st_size / 1e6
        command = [sys.executable, __file__, "--measure-start", str(kv)]
        result = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        assert result["entries"] == entries, result
        table.add_row(
            f"{entries:,}",
            f"{megabytes:.1f}",
            f"{result['seconds']:.3f}",
            f"{result['resident'] / entries:.0f}",
            f"{result['lookup'] * 1e6:.0f}",
        )
        shutil.rmtree(kv)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="where the disk is (default: here)")
    parser.add_argument("--total-mb", type=int, default=1024, help="payload of a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write-threads", type=int, default=DiskSettings.write_threads)
    parser.add_argument("--read-threads", type=int, default=DiskSettings.read_threads)
    parser.add_argument("--fsync", action="store_true")
    parser.add_argument("--max-entries", type=int, default=1_000_000)
    parser.add_argument("--measure-start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_start:
        print(json.dumps(measure_start(options.measure_start)))
        return
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="disk-bench-") as name:
        directory = Path(name)
        if not supports_direct_io(directory):
            console.print(f"{options.directory} refuses O_DIRECT: its rates would be those of the page cache.")
        else:
            threads = (options.write_threads, options.read_threads)
            console.print(
                throughput_table(directory, options.total_mb * 1_000_000, options.runs, threads, options.fsync)
            )
        sizes = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= options.max_entries]
        console.print(start_table(directory, sizes))


if __name__ == "__main__":
    main()
