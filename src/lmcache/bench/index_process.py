"""An engine whose index holds so many chunks, measured in a process of its own. Not one byte of KV is moved."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lmcache.bench.fresh_process import Figures, resident_bytes
from lmcache.bench.shapes import CHUNK_SIZE, random_prompt
from lmcache.bench.timing import median, seconds
from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.config.schema import GIB
from lmcache.keys import prefix_keys
from lmcache.manager import LMCacheManager
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.storage.disk.index import ROWS_PER_COMMIT, DiskIndex, IndexRow

PROMPT_TOKENS = 32_768
PROMPT_CHUNKS = PROMPT_TOKENS // CHUNK_SIZE
LOOKUPS = 64
"""Prompts looked up, each once and far from the last, so that the index does not lie in the processor's caches."""

_METADATA = LMCacheEngineMetadata(model_name="bench", kv_dtype=torch.uint8, kv_shape=(1, 2, CHUNK_SIZE, 1, 8))
_CHUNK_BYTES = 4096
_WARM_UP = 4 * PROMPT_CHUNKS
_PLENTY_GIB = 1 << 20


class _MovesNothing(GPUConnectorInterface):
    """Chunks of one page of host memory, which nobody writes, so that only the index becomes resident."""

    layout = "bench"
    num_layers = 1

    def spec(self, num_tokens: int) -> KVSpec:
        return KVSpec((1, 1, _CHUNK_BYTES), torch.uint8, self.layout, num_tokens)

    def batched_from_gpu(
        self, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]], slot_mapping: torch.Tensor
    ) -> None:
        pass

    batched_to_gpu = batched_from_gpu

    def layer_from_gpu(
        self, layer: int, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]], slot_mapping: torch.Tensor
    ) -> None:
        pass

    layer_to_gpu = layer_from_gpu


def memory_index(entries: int) -> Figures:
    """Start with room for ``entries`` chunks, store them, look some up."""
    with _memory_manager(_WARM_UP) as warm:
        _store(warm.engine, _WARM_UP)
    before = _settled()
    start: list[LMCacheManager] = []
    start_seconds = seconds(lambda: start.append(_memory_manager(entries)))
    with start.pop() as manager:
        store_seconds = _store(manager.engine, entries)
        grown = _settled() - before
        return {
            "start seconds": start_seconds,
            "store seconds": store_seconds / entries,
            "bytes": grown / entries,
            **_look_up(manager.engine, entries),
        }


def fill_disk_index(directory: Path, entries: int) -> None:
    """What an earlier process leaves, but for the files: neither a start nor a lookup touches them."""
    directory.mkdir()
    connector = _MovesNothing()
    namespace, spec = _METADATA.namespace(connector.layout), connector.spec(CHUNK_SIZE)
    index = DiskIndex(directory)
    number = 0
    for prompt in _prompts(entries):
        keys = prefix_keys(namespace, prompt, CHUNK_SIZE)
        rows = [IndexRow(number + i, key, spec, number + i) for i, key in enumerate(keys, start=1)]
        number += len(rows)
        for first in range(0, len(rows), ROWS_PER_COMMIT):
            some = rows[first : first + ROWS_PER_COMMIT]
            index.commit(begun=some, finished=[row.file_id for row in some])
    index.close()


def disk_index(directory: str, entries: int) -> Figures:
    """Start on an index of ``entries`` chunks that an earlier process left, look some up."""
    with _disk_manager(f"{directory}-warm-up"):
        pass
    before = _settled()
    start: list[LMCacheManager] = []
    start_seconds = seconds(lambda: start.append(_disk_manager(directory)))
    with start.pop() as manager:
        grown = _settled() - before
        held = manager.stats().tiers["disk"].entries
        if held != entries:
            raise RuntimeError(f"the disk tier found {held} of {entries} chunks")
        return {"start seconds": start_seconds, "bytes": grown / entries, **_look_up(manager.engine, entries)}


def _memory_manager(entries: int) -> LMCacheManager:
    # One chunk more than is stored, so that nothing is evicted.
    return _manager(max_local_cpu_size=(entries + 1) * _CHUNK_BYTES / GIB)


def _disk_manager(directory: str) -> LMCacheManager:
    return _manager(local_disk=directory, max_local_disk_size=_PLENTY_GIB)


def _manager(**options: object) -> LMCacheManager:
    config = LMCacheEngineConfig.from_defaults(chunk_size=CHUNK_SIZE, **options)
    return LMCacheManager(config, _METADATA, _MovesNothing())


def _prompts(entries: int) -> Iterator[npt.NDArray[np.int64]]:
    """Prompts whose chunks are ``entries`` together; only the last may be shorter."""
    for seed, first in enumerate(range(0, entries, PROMPT_CHUNKS)):
        yield random_prompt(seed, PROMPT_TOKENS)[: (entries - first) * CHUNK_SIZE]


def _store(engine: LMCacheEngine, entries: int) -> float:
    """Seconds that it took."""
    slots = torch.arange(PROMPT_TOKENS)
    taken = 0.0
    stored = 0
    for prompt in _prompts(entries):

        def store(prompt: npt.NDArray[np.int64] = prompt) -> None:
            nonlocal stored
            stored += engine.store(prompt, slot_mapping=slots[: len(prompt)])

        taken += seconds(store)
    if stored != entries * CHUNK_SIZE:
        raise RuntimeError(f"stored {stored} of {entries * CHUNK_SIZE} tokens")
    return taken


def _look_up(engine: LMCacheEngine, entries: int) -> Figures:
    """Seconds of a lookup of a whole prompt, which comes as a list as it does from vLLM, and of naming its chunks."""
    num_prompts = entries // PROMPT_CHUNKS
    lookups, hashes = [], []
    for turn in range(LOOKUPS):
        tokens = random_prompt(turn * num_prompts // LOOKUPS % num_prompts, PROMPT_TOKENS).tolist()
        found = 0

        def look_up(tokens: list[int] = tokens) -> None:
            nonlocal found
            found = engine.lookup(tokens, paged=True)

        lookups.append(seconds(look_up))
        hashes.append(seconds(lambda tokens=tokens: engine.prefix_keys(tokens, paged=True)))  # type: ignore[misc]
        if found != PROMPT_TOKENS:
            raise RuntimeError(f"found {found} of {PROMPT_TOKENS} tokens")
    return {"lookup seconds": median(lookups), "hash seconds": median(hashes)}


def _settled() -> int:
    gc.collect()
    return resident_bytes()
