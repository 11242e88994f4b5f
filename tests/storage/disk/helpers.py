"""Small worlds for the tests of the disk tier."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch

from lmcache.keys import CacheKey, Namespace, PrefixKey, prefix_keys
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.disk import DiskSettings, LocalDiskTier
from lmcache.storage.disk.space import ENTRY_METADATA_BYTES, FIXED_BYTES, SpaceRules
from lmcache.storage.policies.lru import LRUPolicy

REPOSITORY = Path(__file__).parents[3]
NAMESPACE = Namespace(model="disk-tests", kv_dtype="bfloat16", layout="token-major-1")


def spec_of(nbytes: int) -> KVSpec:
    return KVSpec(shape=(nbytes,), dtype=torch.uint8, layout="bytes", num_tokens=1)


SPEC = spec_of(10_000)


def key_of(number: int) -> PrefixKey:
    return prefix_keys(NAMESPACE, [number], 1)[0]


class Heap:
    """Host memory without a bound that counts the objects that are out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.live = 0

    def allocate(self, spec: KVSpec) -> MemoryObj:
        padded = -(-spec.nbytes // 4096) * 4096
        raw = torch.empty(padded + 4096, dtype=torch.uint8)
        start = -raw.data_ptr() % 4096
        with self._lock:
            self.live += 1
        return MemoryObj(spec, raw[start : start + padded], 0, self._released)

    def _released(self, obj: MemoryObj) -> None:
        with self._lock:
            self.live -= 1

    def filled(self, key: CacheKey, spec: KVSpec = SPEC) -> MemoryObj:
        obj = self.allocate(spec)
        # numpy, because torch copies with OpenMP, which hangs in the forked children of the crash test.
        obj.bytes.numpy()[:] = np.frombuffer(content(key, spec.nbytes), dtype=np.uint8)
        return obj


def content(key: CacheKey, nbytes: int) -> bytes:
    """Bytes that only ``key`` has."""
    return np.random.default_rng(list(key.digest)).bytes(nbytes)


def put(tier: LocalDiskTier, heap: Heap, key: CacheKey, spec: KVSpec = SPEC) -> bool:
    with heap.filled(key, spec) as obj:
        return tier.submit_put(key, obj)


def get(tier: LocalDiskTier, key: CacheKey) -> bytes | None:
    obj = tier.submit_get(key).result(timeout=60)
    if obj is None:
        return None
    with obj:
        return obj.bytes.numpy().tobytes()


def capacity_for(entries: int, directory: Path, spec: KVSpec = SPEC) -> int:
    """The capacity at which exactly ``entries`` chunks of ``spec`` fit."""
    charge = SpaceRules(directory, FIXED_BYTES).charge(spec.nbytes)
    return FIXED_BYTES + entries * (charge + ENTRY_METADATA_BYTES)


def open_tier(directory: Path, heap: Heap, capacity_bytes: int = 64 << 20, **settings: object) -> LocalDiskTier:
    options = DiskSettings(directory, capacity_bytes, **settings)  # type: ignore[arg-type]
    return LocalDiskTier(options, heap.allocate, LRUPolicy())


def bytes_on_disk(directory: Path) -> int:
    """What a watcher sees in use, directories included. Files may come and go while it looks."""
    total = 0
    for path in (directory, *directory.rglob("*")):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        total += max(found.st_size, found.st_blocks * 512)
    return total


def chunk_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("??/*.kv"))
