"""What saves cost an engine that decodes: by the engines that copy memory, and by programs on the multiprocessors.

    python -m benchmarks.gpu.background_saves [--tokens 8192] [--programs 1,2,4,8]

``small copies``: how long one of 256 bytes to the host takes, alone and while 256 MiB go there in pieces of some size
on another stream: they stand in one line. ``saves``: a step of decoding is stood in for by a graph of 32 matrix
products of few rows, then a small copy that the host waits for, as an engine waits for its tokens; beside it chunks are
saved from pages of Llama-3.1-8B's shape. GB/s alone and beside it, and what the steps lost. Needs a GPU, and no vLLM.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch

from benchmarks.gpu.setup import whole_numbers
from benchmarks.gpu.transfers import Bench
from lmcache.kernels import chunks_to_host
from lmcache.paging.staged_connector import StagedConnector

PIECES = (1 << 28, 1 << 25, 1 << 22, 1 << 20)
TOTAL, RUNS = 1 << 28, 4


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class SmallCopy:
    """Of what a step has computed to the host, which waits for it."""

    def __init__(self) -> None:
        self._there = torch.zeros(64, dtype=torch.int32, device="cuda")
        self._here = torch.zeros(64, dtype=torch.int32, pin_memory=True)
        self._stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]

    def run(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._here.copy_(self._there, non_blocking=True)
        self._stream.synchronize()


def small_copies(small: SmallCopy) -> None:
    there = torch.empty(TOTAL, dtype=torch.uint8, device="cuda")
    here = torch.empty(TOTAL, dtype=torch.uint8, pin_memory=True)
    large = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    alone = statistics.median(seconds(small.run) for _ in range(50))
    print(f"small copies: alone {1e6 * alone:.0f} µs")
    for size in PIECES:
        waited: list[float] = []
        for _ in range(RUNS):
            torch.cuda.synchronize()
            with torch.cuda.stream(large):
                for at in range(0, TOTAL, size):
                    here[at : at + size].copy_(there[at : at + size], non_blocking=True)
            while not large.query():
                waited.append(seconds(small.run))
        told = f"median {1e6 * statistics.median(waited):.0f}, longest {1e6 * max(waited):.0f} µs" if waited else "none"
        print(f"  beside pieces of {size >> 20} MiB: {told}", flush=True)


class Decoding:
    """Steps that read weights, and end with a small copy."""

    def __init__(self, small: SmallCopy) -> None:
        self._small = small
        weights = [torch.randn(4096, 14336, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
        x = torch.randn(32, 4096, device="cuda", dtype=torch.bfloat16)

        def forward() -> None:
            for layer in range(32):
                x @ weights[layer % 8]

        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(beside):
            forward()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            forward()
        for _ in range(20):
            self.step()
        self.step_seconds = statistics.median(seconds(self.step) for _ in range(50))

    def step(self) -> None:
        self._graph.replay()
        self._small.run()


@dataclass
class Beside:
    """Medians; ``gb_s`` of a save while steps run, ``lost`` seconds of steps meanwhile."""

    alone_gb_s: float
    gb_s: float
    lost: float
    longest_step: float


def save_beside(bench: Bench, decoding: Decoding) -> Beside:
    def save() -> None:
        torch.cuda.set_device(0)
        bench.from_pages(bench.slots, bench.sets[1])

    for obj in bench.sets[1]:
        obj.bytes.zero_()
    alone = [seconds(save) for _ in range(RUNS)]
    assert all(torch.equal(one.bytes, other.bytes) for one, other in zip(*bench.sets, strict=True))
    took: list[float] = []
    lost: list[float] = []
    longest: list[float] = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        saving = threading.Thread(target=lambda: took.append(seconds(save)))
        steps: list[float] = []
        saving.start()
        while saving.is_alive():
            steps.append(seconds(decoding.step))
        lost.append(sum(steps) - decoding.step_seconds * len(steps))
        longest.append(max(steps))
    middle = statistics.median
    return Beside(bench.nbytes / middle(alone) / 1e9, bench.nbytes / middle(took) / 1e9, middle(lost), middle(longest))


def saves(small: SmallCopy, tokens: int, programs: list[int]) -> None:
    decoding, bench = Decoding(small), Bench("cuda", tokens, tiny=False)
    bench.check()
    connector = bench.connector
    assert isinstance(connector, StagedConnector)
    print(f"saves of {bench.nbytes >> 20} MiB; a step alone takes {1e3 * decoding.step_seconds:.2f} ms")

    def tell(way: str) -> None:
        found = save_beside(bench, decoding)
        print(
            f"  {way:14} {found.alone_gb_s:5.1f} GB/s alone; beside steps {found.gb_s:5.1f} GB/s, "
            f"{1e3 * found.lost:6.1f} ms lost, longest step {1e3 * found.longest_step:.2f} ms",
            flush=True,
        )

    with patch.object(connector, "_background_saves", False):
        tell("copy engines")
    with patch.object(connector, "_background_saves", True):
        for count in programs:
            with patch.dict(chunks_to_host.copy_to_host.__kwdefaults__ or {}, programs=count):
                tell(f"{count} programs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--programs", type=whole_numbers, default=[1, 2, 4, 8])
    options = parser.parse_args()
    small = SmallCopy()
    small_copies(small)
    saves(small, options.tokens, options.programs)


if __name__ == "__main__":
    main()
