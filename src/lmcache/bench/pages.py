"""Storing and retrieving KV that lies in vLLM-CPU's pages, against a raw copy of the same bytes.

Pages are laid out as vLLM 0.32's CPU backend does it (K transposed), a tensor a layer in one storage; the blocks of the
request lie scattered among twice as many. What serves here copies whole pages. The rows "token by token" show the way
that works for every strided layout, and so what transposing K costs.
"""

from __future__ import annotations

import torch

from lmcache.bench.raw_copy import copy_chunks, pool_like_chunks, touched
from lmcache.bench.rows import Row
from lmcache.bench.settings import Settings
from lmcache.bench.shapes import CHUNK_SIZE, LLAMA_8B, SMOLLM2, SMOLLM2_FP32, ModelShape, random_prompt
from lmcache.bench.timing import Work, median, share, take_turns
from lmcache.config import LMCacheEngineConfig
from lmcache.config.schema import GIB
from lmcache.manager import LMCacheManager
from lmcache.memory.one_thread import one_thread
from lmcache.paging.detect import PageHints, detect_layout
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.paging.make_connector import make_connector
from lmcache.paging.token_connector import TokenConnector

SHAPES = (SMOLLM2, SMOLLM2_FP32, LLAMA_8B)
BLOCK_SIZE = 128
MIN_SHARE = 0.7


def measure_pages(settings: Settings) -> list[Row]:
    rows = []
    with one_thread():
        for shape in SHAPES:
            rows += _measure_shape(shape, settings)
    return rows


def _measure_shape(shape: ModelShape, settings: Settings) -> list[Row]:
    chunks = shape.num_chunks(settings.copy_bytes)
    num_tokens = chunks * CHUNK_SIZE
    blocks = 2 * num_tokens // BLOCK_SIZE
    pages = torch.randn(shape.layers, blocks, shape.heads, BLOCK_SIZE, 2 * shape.dim, dtype=shape.dtype)
    tensors = list(pages)
    hints = PageHints(BLOCK_SIZE, shape.heads, shape.dim, backend="CPU_ATTN")
    layout = detect_layout({f"layers.{i}": tensor for i, tensor in enumerate(tensors)}, hints)
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))[: num_tokens // BLOCK_SIZE]
    slots = (table[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
    prompt = random_prompt(0, num_tokens).tolist()

    def turns(connector: GPUConnectorInterface, runs: int) -> dict[str, list[float]]:
        size = (chunks + 1) * (shape.chunk_bytes + 4096) / GIB
        config = LMCacheEngineConfig.from_defaults(chunk_size=CHUNK_SIZE, max_local_cpu_size=size)
        with LMCacheManager(config, shape.metadata, connector) as manager:
            engine = manager.engine

            def store() -> None:
                if engine.store(prompt, slot_mapping=slots) != num_tokens:
                    raise RuntimeError("not every token was stored: the machine is short of memory")

            def retrieve() -> None:
                assert bool(engine.retrieve(prompt, slot_mapping=slots).all())

            here = touched(pool_like_chunks(chunks, shape.chunk_bytes))
            there = touched(torch.empty_like(here))
            taken = take_turns(
                {
                    "store": Work(store, before=engine.clear),
                    "raw": Work(lambda: copy_chunks(here, there)),
                    "retrieve": Work(retrieve),
                },
                runs,
            )
            before = pages.clone()
            pages[:, table] = 0
            retrieve()
            if not torch.equal(pages, before):
                raise RuntimeError("what was retrieved is not what was stored")
            return taken

    def rows(suffix: str, taken: dict[str, list[float]], min_share: float | None) -> list[Row]:
        rate = chunks * shape.chunk_bytes / 1e9
        return [
            Row(
                subject="pages",
                figure=f"{figure} {suffix}",
                case=f"{shape}, {num_tokens:,} tokens",
                unit="GB/s",
                value=rate / median(taken[figure]),
                baseline="copy to warm memory",
                raw=rate / median(taken["raw"]),
                share=share(taken[figure], taken["raw"]),
                min_share=min_share,
            )
            for figure in ("store", "retrieve")
        ]

    by_page = make_connector(layout, tensors, CHUNK_SIZE)
    by_token = TokenConnector(layout, tensors)
    return rows("from/to pages", turns(by_page, settings.runs), MIN_SHARE) + rows(
        "token by token", turns(by_token, max(3, settings.runs // 3)), None
    )
