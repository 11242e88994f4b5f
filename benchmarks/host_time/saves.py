"""What saving a prompt's KV takes of the interpreter, which vLLM's loop needs at the same time.

    python -m benchmarks.host_time.saves [--tokens 8192] [--runs 60] [--profile]

No GPU: kernels, streams and copies are stand-ins that do nothing. Host memory is full, so each chunk evicts another.
Milliseconds of processor time of the saving thread a prompt, lower quartiles and medians; what of it runs without the
interpreter's lock counts too.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from benchmarks.host_time.stand_ins import install

_WARM_UP = 40
_MEMORY_GB = 0.2


def _watch(name: str, owner: Any, attribute: str, spent: dict[str, float]) -> None:
    call: Callable[..., Any] = getattr(owner, attribute)

    @wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name] += 1e3 * (time.thread_time() - start)

    setattr(owner, attribute, timed)


def measure(num_tokens: int, runs: int, profile: bool) -> None:
    first_copy = install()
    from benchmarks.host_time.engine import HostEngine
    from lmcache.cache_engine import LMCacheEngine
    from lmcache.chunk_writes import ChunkWrites
    from lmcache.integration.vllm.page_saves import PageSaves
    from lmcache.paging.staged_connector import StagedConnector

    spent: defaultdict[str, float] = defaultdict(float)
    profiler = cProfile.Profile(time.thread_time)
    if profile:
        save = PageSaves.save
        PageSaves.save = lambda *args: profiler.runcall(save, *args)  # type: ignore[method-assign]
    else:
        for name, owner, attribute in (
            ("save", PageSaves, "save"),
            ("  store", LMCacheEngine, "store"),
            ("    gather", StagedConnector, "batched_from_gpu"),
            ("    publish", ChunkWrites, "publish"),
            ("  remember", PageSaves, "_remember"),
        ):
            _watch(name, owner, attribute, spent)
    engine = HostEngine(num_tokens, first_copy, _MEMORY_GB)
    random = np.random.default_rng(3)
    rows: defaultdict[str, list[float]] = defaultdict(list)
    gc.collect()
    for number in range(-_WARM_UP, runs):
        spent.clear()
        engine.compute(random.integers(0, 128_000, num_tokens).tolist())
        if number >= 0:
            for name, milliseconds in spent.items():
                rows[name].append(milliseconds)
    engine.close()
    for name in sorted(rows, key=list(spent).index, reverse=True):
        print(f"{name:16}{statistics.quantiles(rows[name], n=4)[0]:8.2f}{statistics.median(rows[name]):8.2f}")
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--profile", action="store_true", help="what cProfile says instead")
    arguments = parser.parse_args()
    measure(arguments.tokens, arguments.runs, arguments.profile)


if __name__ == "__main__":
    main()
