"""Whole chunks between pinned host memory and pages: GB/s of either way and of both at once, against plain copies.

    python -m benchmarks.gpu.transfers [--runs 9] [--tokens 16384]

The connector that vLLM would get, on pages of Llama-3.1-8B's shape in shuffled order, chunks of 256 tokens. "end to
end" is the whole call until the pages, or the host memory, hold it all. Plain copies are one of the same size between
pinned memory and the GPU. Needs no vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.paging.detect import PageHints, detect_layout
from lmcache.paging.make_connector import make_connector
from lmcache.paging.paged_connector import PagedConnector

CHUNK, BLOCK = 256, 16


def pages(device: str, layers: int, heads: int, dim: int, tokens: int) -> list[torch.Tensor]:
    """``[blocks, 2, block, heads, dim]`` a layer, as vLLM's FlashAttention has them."""
    blocks = tokens // BLOCK * 2
    return [torch.randn(blocks, 2, BLOCK, heads, dim, device=device).to(torch.bfloat16) for _ in range(layers)]


class Bench:
    def __init__(self, device: str, tokens: int, *, tiny: bool) -> None:
        layers, heads, dim = (2, 2, 64) if tiny else (32, 8, 128)
        self.device = device
        self.tensors = pages(device, layers, heads, dim, tokens)
        layout = detect_layout(
            {f"layer.{index}": tensor for index, tensor in enumerate(self.tensors)},
            PageHints(BLOCK, heads, dim, "FLASH_ATTN"),
        )
        self.connector = make_connector(layout, self.tensors, CHUNK, token_major=True)
        spec = KVSpec((layers, 2, CHUNK, heads, dim), torch.bfloat16, TOKEN_MAJOR, CHUNK)
        self.nbytes = spec.nbytes * (tokens // CHUNK)
        self.pool = SlabAllocator(2 * self.nbytes + (64 << 20))
        self.sets = [self._chunks(spec, tokens // CHUNK) for _ in range(2)]
        blocks = torch.randperm(tokens // BLOCK * 2)[: tokens // BLOCK]
        self.slots = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        others = torch.tensor(sorted(set(range(tokens // BLOCK * 2)) - set(blocks.tolist())))
        self.other_slots = (others[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        self.ranges = [(start, start + CHUNK) for start in range(0, tokens, CHUNK)]

    def _chunks(self, spec: KVSpec, count: int) -> list[MemoryObj]:
        objs = [self.pool.allocate(spec) for _ in range(count)]
        assert all(obj is not None for obj in objs)
        for obj in objs:
            assert obj is not None
            obj.tensor.copy_(torch.randn(spec.shape, device=self.device))
        return [obj for obj in objs if obj is not None]

    def to_pages(self, slots: torch.Tensor, objs: list[MemoryObj]) -> None:
        self.connector.batched_to_gpu(objs, self.ranges, slots)
        synchronize_stream(self.device)

    def from_pages(self, slots: torch.Tensor, objs: list[MemoryObj]) -> None:
        self.connector.batched_from_gpu(objs, self.ranges, slots)

    def both(self) -> None:
        threads = [
            threading.Thread(target=self.in_own_stream, args=(self.to_pages, self.slots, self.sets[0])),
            threading.Thread(target=self.in_own_stream, args=(self.from_pages, self.other_slots, self.sets[1])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def in_own_stream(
        self, move: Callable[[torch.Tensor, list[MemoryObj]], None], slots: torch.Tensor, objs: list[MemoryObj]
    ) -> None:
        if self.device == "cpu":
            move(slots, objs)
            return
        with torch.cuda.stream(torch.cuda.Stream()):
            move(slots, objs)

    def check(self) -> None:
        """What went into the pages comes out of them, and nothing else of the pages changed."""
        before = [tensor.clone() for tensor in self.tensors] if self.device == "cpu" else None
        self.to_pages(self.slots, self.sets[0])
        self.from_pages(self.slots, self.sets[1])
        for one, other in zip(*self.sets, strict=True):
            assert torch.equal(one.bytes, other.bytes)
        if before is not None:
            blocks = self.other_slots[::BLOCK] // BLOCK
            for tensor, old in zip(self.tensors, before, strict=True):
                assert torch.equal(tensor[blocks], old[blocks])


def plain_copies(device: str, nbytes: int) -> dict[str, Callable[[], None]]:
    host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device == "cuda")
    there, again = torch.zeros_like(host, device=device), torch.zeros_like(host, device=device)

    def copied(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        return lambda: (target.copy_(source, non_blocking=True), synchronize_stream(device))[1]

    return {
        "host to device, plain copy": copied(there, host),
        "device to host, plain copy": copied(host, there),
        "device to device, plain copy": copied(again, there),
    }


def synchronize_stream(device: str) -> None:
    if device == "cuda":
        torch.cuda.current_stream().synchronize()


def gb_per_second(call: Callable[[], None], nbytes: int, runs: int) -> list[float]:
    found = []
    for run in range(runs + 2):
        start = time.perf_counter()
        call()
        if run >= 2:
            found.append(nbytes / (time.perf_counter() - start) / 1e9)
    return found


def name_of(connector: PagedConnector) -> str:
    return type(connector).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--tiny", action="store_true", help="a small shape on a CPU: only tries this script out")
    given = parser.parse_args()
    device, tokens = ("cpu", 1024) if given.tiny else ("cuda", given.tokens)
    bench = Bench(device, tokens, tiny=given.tiny)
    bench.check()
    calls = {
        "host to pages": (lambda: bench.to_pages(bench.slots, bench.sets[0]), bench.nbytes),
        "pages to host": (lambda: bench.from_pages(bench.slots, bench.sets[1]), bench.nbytes),
        "both at once": (bench.both, 2 * bench.nbytes),
        **{name: (call, bench.nbytes) for name, call in plain_copies(device, bench.nbytes).items()},
    }
    figures = {name: gb_per_second(call, nbytes, given.runs) for name, (call, nbytes) in calls.items()}
    print(f"{name_of(bench.connector)}, {tokens} tokens, {bench.nbytes / 1e9:.2f} GB")
    for name, each in figures.items():
        print(f"{name:30} {statistics.median(each):8.1f} GB/s  [{min(each):.1f}–{max(each):.1f}]")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "transfers.json").write_text(
        json.dumps({"connector": name_of(bench.connector), "tokens": tokens, "gb_s": figures}, indent=1)
    )
    for objs in bench.sets:
        for obj in objs:
            obj.ref_down()
    bench.pool.close()


if __name__ == "__main__":
    main()
