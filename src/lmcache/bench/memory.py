"""Storing and retrieving KV as contiguous tensors, against a raw copy of the same bytes.

*Warm*: every page of source and target was touched before. *Fresh*: the target is memory that the process has just got,
so that the kernel clears each page as it is first written. Retrieving always returns a fresh tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmcache.bench.raw_copy import copy_chunks, pool_like_chunks, touched
from lmcache.bench.rows import Row
from lmcache.bench.settings import Settings
from lmcache.bench.shapes import CHUNK_SIZE, LLAMA_8B, SMOLLM2, SMOLLM2_FP32, ModelShape, random_prompt
from lmcache.bench.timing import Work, median, share, take_turns
from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.config.schema import GIB
from lmcache.manager import LMCacheManager
from lmcache.memory.one_thread import one_thread

SHAPES = (SMOLLM2, SMOLLM2_FP32, LLAMA_8B)
MIN_SHARE = 0.9


def measure_memory(settings: Settings) -> list[Row]:
    rows = []
    with one_thread():
        for shape in SHAPES:
            rows += _measure_shape(shape, settings)
    return rows


@dataclass(frozen=True)
class _Case:
    shape: ModelShape
    prompt: list[int]
    kv: torch.Tensor

    @property
    def num_chunks(self) -> int:
        return len(self.prompt) // CHUNK_SIZE

    def manager(self) -> LMCacheManager:
        # Room for one more chunk than is stored, so that nothing is evicted.
        size = (self.num_chunks + 1) * (self.shape.chunk_bytes + 4096) / GIB
        config = LMCacheEngineConfig.from_defaults(chunk_size=CHUNK_SIZE, max_local_cpu_size=size)
        return LMCacheManager(config, self.shape.metadata)

    def store(self, engine: LMCacheEngine) -> None:
        stored = engine.store(self.prompt, self.kv)
        if stored != len(self.prompt):
            raise RuntimeError(f"stored {stored} of {len(self.prompt)} tokens: the machine is short of memory")

    def retrieve(self, engine: LMCacheEngine, out: torch.Tensor | None = None) -> torch.Tensor:
        kv, found = engine.retrieve(self.prompt, return_tuple=False, out=out)
        assert isinstance(kv, torch.Tensor)
        assert bool(found.all())
        return kv


def _measure_shape(shape: ModelShape, settings: Settings) -> list[Row]:
    chunks = shape.num_chunks(settings.copy_bytes)
    layers, planes, _, heads, dim = shape.metadata.kv_shape
    kv = torch.randn(layers, planes, chunks * CHUNK_SIZE, heads, dim, dtype=shape.dtype)
    case = _Case(shape, random_prompt(0, chunks * CHUNK_SIZE).tolist(), kv)
    source = kv.view(torch.uint8).view(chunks, -1)
    pooled = touched(pool_like_chunks(chunks, shape.chunk_bytes))
    result = touched(torch.empty_like(source))
    out = touched(torch.empty_like(kv).view(torch.uint8)).view(kv.dtype)

    def fresh_result() -> torch.Tensor:
        target = torch.empty_like(source)
        copy_chunks(target, pooled)
        return target

    with case.manager() as manager:
        engine = manager.engine
        stores = take_turns(
            {
                "ours": Work(lambda: case.store(engine), before=engine.clear),
                "raw": Work(lambda: copy_chunks(pooled, source)),
            },
            settings.runs,
        )
        retrieves = take_turns(
            {
                "ours": Work(lambda: case.retrieve(engine, out)),
                "ours, fresh": Work(lambda: case.retrieve(engine)),
                "raw": Work(lambda: copy_chunks(result, pooled)),
                "raw, fresh": Work(fresh_result),
            },
            settings.runs,
        )
        if not torch.equal(case.retrieve(engine, out), kv):
            raise RuntimeError("what was retrieved is not what was stored")
    fresh = _fresh_stores(case, source, settings.runs)

    def row(figure: str, target: str, ours: list[float], raw: list[float], min_share: float | None = None) -> Row:
        rate = source.numel() / 1e9
        return Row(
            subject="memory",
            figure=figure,
            case=f"{shape}, {len(case.prompt):,} tokens",
            unit="GB/s",
            value=rate / median(ours),
            baseline=f"copy to {target} memory",
            raw=rate / median(raw),
            share=share(ours, raw),
            min_share=min_share,
        )

    return [
        row("store", "warm", stores["ours"], stores["raw"], MIN_SHARE),
        row("store into a fresh pool", "fresh", fresh["ours"], fresh["raw"]),
        row("retrieve", "warm", retrieves["ours"], retrieves["raw"], MIN_SHARE),
        row("retrieve, both to fresh memory", "fresh", retrieves["ours, fresh"], retrieves["raw, fresh"]),
    ]


def _fresh_stores(case: _Case, source: torch.Tensor, runs: int) -> dict[str, list[float]]:
    manager = case.manager()

    def renew() -> None:
        nonlocal manager
        manager.close()
        manager = case.manager()

    def raw() -> torch.Tensor:
        target = pool_like_chunks(*source.shape)
        copy_chunks(target, source)
        return target

    try:
        return take_turns({"ours": Work(lambda: case.store(manager.engine), before=renew), "raw": Work(raw)}, runs)
    finally:
        manager.close()
