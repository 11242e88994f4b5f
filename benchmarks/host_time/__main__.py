"""What the host does for one request before the GPU has anything to do, and how long that takes.

    python -m benchmarks.host_time [--lengths 4096,8192,16384,32768] [--runs 9] [--profile KIND]

No GPU: kernels, streams and copies are stand-ins that do nothing. Both roles of the connector for vLLM run as they do
in a step, with vLLM's own request objects: ``new`` prompts were never seen, a ``reload`` is known whole, a ``blend``
is known documents of 1,024 tokens in another order. ``first copy`` is the time from the look-up to the first copy that
is queued; the rest of a blend runs beside the copies. What was done while the system took the core away is
done again, twice at most.
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
from functools import partial, wraps
from typing import Any

import numpy as np

from benchmarks.host_time.stand_ins import install
from lmcache.bench.machine import describe_machine

DOCUMENT, SYSTEM, QUESTION = 1024, 48, 32
_TRIES = 3
KINDS = ("new", "reload", "blend")


class Stopwatch:
    """Milliseconds spent in functions, those that they call included."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)

    def watch(self, name: str, owner: Any, attribute: str) -> None:
        held = vars(owner)[attribute]
        call = held.__func__ if isinstance(held, classmethod | staticmethod) else held
        timed = self._timed(name, call)
        setattr(owner, attribute, classmethod(timed) if isinstance(held, classmethod) else timed)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[name] += 1e3 * (time.perf_counter() - start)

        return timed


def watched() -> Stopwatch:
    from lmcache.blend import blend_pass, forwards, paged_batch, paged_blend, staged_layers
    from lmcache.cache_engine import LMCacheEngine
    from lmcache.integration.vllm import scheduler_side, worker_side
    from lmcache.integration.vllm.blend import scheduling
    from lmcache.integration.vllm.save_planner import SavePlanner
    from lmcache.paging.staged_connector import StagedConnector

    watch = Stopwatch()
    side = scheduler_side.SchedulerSide
    for name, owner, attribute in (
        ("look up", side, "get_num_new_matched_tokens"),
        ("  prefix keys", LMCacheEngine, "prefix_keys"),
        ("  prefetch", LMCacheEngine, "prefetch"),
        ("  find", scheduling.BlendScheduling, "look_up"),
        ("  promise", scheduling.BlendScheduling, "promise"),
        ("metadata", side, "build_connector_meta"),
        ("  plan saves", SavePlanner, "plan"),
        ("load", worker_side.WorkerSide, "_load"),
        ("  groups", StagedConnector, "_load"),
        ("blend", worker_side.WorkerSide, "_blend"),
        ("  slots", worker_side.WorkerSide, "_slots_of"),
        ("  planned", paged_blend.PagedPrompt, "planned"),
        ("  batch", blend_pass, "BlendBatch"),
        ("  pages", paged_batch.PagedBatchKV, "__init__"),
        ("    staged layers", staged_layers.StagedLayers, "__init__"),
        ("    begin", staged_layers.StagedLayers, "begin"),
        ("  select", blend_pass._Blend, "_select"),
        ("    attention", blend_pass._Blend, "attention_received"),
        ("  result's plan", blend_pass.BlendPlan, "select"),
        ("  recompute", forwards.Recompute, "run"),
        ("  load layers", paged_batch.PagedBatchKV, "load"),
        ("  report", worker_side.WorkerSide, "_count_blend"),
        ("queue saves", worker_side.WorkerSide, "wait_for_save"),
    ):
        if attribute in vars(owner):
            watch.watch(name, owner, attribute)
    return watch


class Prompts:
    """Of random tokens, as lists of ints, which is what vLLM has."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(1)
        self.system = self.tokens(SYSTEM)

    def tokens(self, count: int) -> list[int]:
        tokens: list[int] = self._random.integers(0, 128_000, count).tolist()
        return tokens

    def over(self, documents: list[list[int]], count: int) -> list[int]:
        chosen = self._random.permutation(len(documents))[:count]
        return [*self.system, *(token for index in chosen for token in documents[index]), *self.tokens(QUESTION)]


def lower_quartile(figures: list[float]) -> float:
    return statistics.quantiles(figures, n=4, method="inclusive")[0] if len(figures) > 1 else figures[0]


def measure(lengths: list[int], runs: int, profile: str | None, *, quartiles: bool) -> None:
    first_copy = install()
    from benchmarks.host_time.engine import HostEngine

    watch = watched()
    prompts = Prompts()
    longest = max(lengths) + SYSTEM + QUESTION
    engine = HostEngine(longest, first_copy)
    documents = [prompts.tokens(DOCUMENT) for _ in range(max(lengths) // DOCUMENT)]
    for document in documents:
        engine.keep([*prompts.system, *document])
    for _ in range(4):  # others' prompts in the index
        engine.keep(prompts.tokens(longest))
    rows: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    profiler = cProfile.Profile()
    gc.collect()
    gc.disable()
    for length in lengths:
        known = prompts.tokens(length + SYSTEM + QUESTION)
        engine.keep(known)
        makes: dict[str, tuple[Callable[[], list[int]], dict[str, Any] | None]] = {
            "new": (partial(prompts.tokens, len(known)), None),
            "reload": (partial(list, known), {"lmcache.blend": False}),
            "blend": (partial(prompts.over, documents, length // DOCUMENT), None),
        }
        for number in range(-2, runs):
            for kind, (make, params) in makes.items():
                for _ in range(_TRIES):
                    tokens = make()
                    watch.spent.clear()
                    if profile == kind and number >= 0 and length == max(lengths):
                        profiler.enable()
                    answer = engine.ask(tokens, params)
                    profiler.disable()
                    if not answer.disturbed:
                        break
                if number < 0:
                    continue
                rows[kind, "first copy"][length].append(1e3 * answer.until_copy)
                for name, spent in watch.spent.items():
                    rows[kind, name][length].append(spent)
                rows[kind, "all"][length].append(1e3 * answer.total)
    engine.close()
    print(f"{describe_machine()}; milliseconds, {'lower quartiles' if quartiles else 'medians'} of {runs}")
    middle = lower_quartile if quartiles else statistics.median
    for kind in KINDS:
        print(f"\n{kind:20}" + "".join(f"{length:>15,}" for length in lengths))
        for (of, name), spent in rows.items():
            if of == kind:
                medians = {length: middle(spent[length]) for length in lengths if spent[length]}
                totals = {length: middle(rows[kind, "all"][length]) for length in lengths}
                cells = (
                    f"{medians[length]:>9.2f} {medians[length] / totals[length]:>4.0%}" if length in medians else ""
                    for length in lengths
                )
                print(f"{name:20}" + "".join(f"{cell:>15}" for cell in cells))
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8192,16384,32768", help="tokens, multiples of 1,024")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--profile", choices=KINDS, help="also what cProfile says of the longest ones")
    parser.add_argument("--quartiles", action="store_true", help="lower quartiles, for a machine that is busy")
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    measure(lengths, arguments.runs, arguments.profile, quartiles=arguments.quartiles)


if __name__ == "__main__":
    main()
