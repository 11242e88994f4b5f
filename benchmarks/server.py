"""What a server costs: lookup and retrieve through ``lmcache server`` beside the same in the process itself.

    python -m benchmarks.server [--rounds 121] [--tokens 8192] [--json FILE]

Both engines hold the same prompt. Rounds alternate between the two, so that whatever else the machine does meets both;
medians are printed, and their ratio. Of retrieves also the processor time of both processes, which leaves out the wait
for a core that other programs have: where the machine has nothing else to do, the bytes per second come to that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lmcache.config import LMCacheEngineConfig
from lmcache.manager import LMCacheManager
from lmcache.metadata import LMCacheEngineMetadata

# A model of 8 billion parameters on two ranks, a quarter of its layers: 8 MiB a chunk.
LAYERS, HEADS, DIM, CHUNK = 16, 4, 128, 256


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def alternate(
    calls: list[Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The median of each, in seconds of ``clock``; every round does all of them, once untimed."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, said in zip(calls, seconds, strict=True):
            took = timed(call, clock)
            if number:
                said.append(took)
    return [statistics.median(said) for said in seconds]


def processor_seconds(server: int) -> float:
    """Of this process and of the process ``server``."""
    nanoseconds = 0
    for task in Path(f"/proc/{server}/task").iterdir():
        nanoseconds += int((task / "schedstat").read_text().split()[0])
    return time.process_time() + nanoseconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=121)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    metadata = LMCacheEngineMetadata("benchmark", kv_dtype=torch.bfloat16, kv_shape=(LAYERS, 2, CHUNK, HEADS, DIM))
    nbytes = options.tokens * metadata.bytes_per_token
    gib = 2 * nbytes / (1 << 30) + 0.2
    tokens = torch.randint(0, 32000, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    kv = torch.randn(LAYERS, 2, options.tokens, HEADS, DIM).to(torch.bfloat16)
    out = torch.empty_like(kv)
    with tempfile.TemporaryDirectory() as scratch:
        socket = Path(scratch, "kv.sock")
        server = subprocess.Popen(
            [sys.executable, "-m", "lmcache.cli", "server", "--socket", str(socket)],
            env={**os.environ, "LMCACHE_MAX_LOCAL_CPU_SIZE": str(gib)},
            stdout=subprocess.PIPE,
        )
        try:
            assert server.stdout is not None
            server.stdout.readline()
            settings = [{"max_local_cpu_size": gib}, {"server_socket": str(socket)}]
            managers = [
                LMCacheManager(LMCacheEngineConfig.from_defaults(chunk_size=CHUNK, **each), metadata)
                for each in settings
            ]
            engines = [manager.engine for manager in managers]
            for engine in engines:
                assert engine.store(tokens, kv) == options.tokens
                out.zero_()
                engine.retrieve(tokens, return_tuple=False, out=out)
                assert torch.equal(out, kv)
            lookup = alternate([lambda e=e: e.lookup(tokens) for e in engines], 2 * options.rounds)
            one = alternate([lambda e=e: e.lookup(tokens[:CHUNK]) for e in engines], 2 * options.rounds)
            retrieves = [lambda e=e: e.retrieve(tokens, return_tuple=False, out=out) for e in engines]
            retrieve = alternate(retrieves, options.rounds)
            work = alternate(retrieves, options.rounds, lambda: processor_seconds(server.pid))
            for manager in managers:
                manager.close()
        finally:
            server.terminate()
            server.wait()
    result = {
        "tokens": options.tokens,
        "bytes": nbytes,
        "lookup_ms": [1e3 * each for each in lookup],
        "lookup_extra_ms": 1e3 * (lookup[1] - lookup[0]),
        "lookup_of_one_chunk_extra_ms": 1e3 * (one[1] - one[0]),
        "retrieve_gb_per_s": [nbytes / each / 1e9 for each in retrieve],
        "retrieve_ratio": retrieve[0] / retrieve[1],
        "retrieve_processor_ms": [1e3 * each for each in work],
        "retrieve_processor_ratio": work[0] / work[1],
    }
    print(f"{options.tokens} tokens, {nbytes / 1e6:.0f} MB, medians of {options.rounds} rounds, in-process | server")
    print(f"lookup        {lookup[0] * 1e3:8.3f} ms | {lookup[1] * 1e3:8.3f} ms, {result['lookup_extra_ms']:+.3f} ms")
    print(f"  one chunk   {one[0] * 1e3:8.3f} ms | {one[1] * 1e3:8.3f} ms, {1e3 * (one[1] - one[0]):+.3f} ms")
    speeds = result["retrieve_gb_per_s"]
    print(f"retrieve      {speeds[0]:8.2f} GB/s | {speeds[1]:6.2f} GB/s, {result['retrieve_ratio']:.1%}")
    print(
        f"  processor {work[0] * 1e3:8.2f} ms   | {work[1] * 1e3:6.2f} ms,   {result['retrieve_processor_ratio']:.1%}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
