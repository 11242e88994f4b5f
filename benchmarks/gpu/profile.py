"""Where the time of a blend goes: on the host by function, on the GPU by kernel, and how long the GPU stands idle.

    python -m benchmarks.gpu.profile [--lengths 4096,16384] [--ratios 0.15,0.05]

Each prompt is asked four times: to warm up, timed, under cProfile (which makes Python two or three times as slow: only
the shares count), and under torch's profiler. Prints tables; ``--out`` gets the same as ``profile.txt``.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import sys
from typing import Any, TextIO

from benchmarks.gpu.engine import Answer, Engine
from benchmarks.gpu.prompts import Prompts, Tokens
from benchmarks.gpu.setup import OURS, Setup, numbers, parser, whole_numbers

FUNCTIONS, KERNELS, GAPS = 40, 25, 15


class Both:
    """Standard output and a file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def print(self, text: str = "") -> None:
        print(text, flush=True)
        print(text, file=self._file, flush=True)


def look_at(engine: Engine, prompts: Prompts, documents: list[Tokens], count: int, ratio: float, out: Both) -> None:
    params = {"lmcache.blend_ratio": ratio}

    def ask() -> Answer:
        answer = engine.ask(prompts.over(documents, count), params)
        engine.forget()
        return answer

    ask()
    timed = ask()
    blend = ((timed.report or {}).get("blend")) or {}
    tokens = count * len(documents[0])
    out.print(f"\n=== {tokens} tokens, {ratio:.0%}: {timed.seconds * 1e3:.1f} ms; {blend.get('milliseconds')}")
    profile = cProfile.Profile()
    profile.enable()
    ask()
    profile.disable()
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text).strip_dirs()
    stats.sort_stats("tottime").print_stats(FUNCTIONS)
    stats.sort_stats("cumulative").print_stats(FUNCTIONS)
    out.print(text.getvalue())
    trace(ask, out)


def trace(ask: Any, out: Both) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        ask()
    averages = found.key_averages()
    out.print(averages.table(sort_by="self_cpu_time_total", row_limit=KERNELS, max_name_column_width=60))
    if not on_gpu:
        return
    out.print(averages.table(sort_by="self_cuda_time_total", row_limit=KERNELS, max_name_column_width=80))
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events()
        if str(event.device_type).endswith("CUDA")
    )
    if spans:
        print_idle(spans, out)


def print_idle(spans: list[tuple[float, float, str]], out: Both) -> None:
    """``spans``: when each kernel and copy began and ended, in µs. Prints when the GPU was idle, or copied only."""
    first = spans[0][0]
    busy = computing = 0.0
    reached = reached_computing = first
    gaps: list[tuple[float, float, str, str]] = []
    before = ""
    for start, end, name in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        if name.startswith("Memcpy HtoD"):
            continue
        if start > reached_computing:
            gaps.append((start - reached_computing, reached_computing - first, before, name))
        computing += max(0.0, end - max(start, reached_computing))
        if end > reached_computing:
            reached_computing, before = end, name
    whole = reached - first
    out.print(
        f"{len(spans)} kernels and copies; of {whole / 1e3:.1f} ms the GPU is busy for {busy / 1e3:.1f} ms, "
        f"computing for {computing / 1e3:.1f} ms"
    )
    out.print("longest times without a kernel, in ms: how long, from when on, after what, before what")
    for length, at, last, following in sorted(gaps, reverse=True)[:GAPS]:
        out.print(f"{length / 1e3:8.2f} {at / 1e3:8.2f}  {last[:50]:50}  {following[:50]}")


def main() -> None:
    options = arguments(parser(__doc__, [OURS], host_gib=8))
    document = 512 if options.tiny else 1024
    longest = max(options.lengths) + 4096
    setup = Setup.of(options, OURS, longest, longest)
    engine = Engine(setup)
    prompts = Prompts(setup)
    documents = prompts.documents(max(options.lengths) // document, document)
    for known in documents:
        engine.ask([*prompts.system, *known], {"lmcache.blend": False})
        engine.forget()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "profile.txt").open("w") as file:
        for length in options.lengths:
            for ratio in options.ratios:
                look_at(engine, prompts, documents, length // document, ratio, Both(file))
    sys.stdout.flush()


def arguments(found: argparse.ArgumentParser) -> argparse.Namespace:
    found.add_argument("--lengths", type=whole_numbers)
    found.add_argument("--ratios", type=numbers, default=[0.15, 0.05])
    options = found.parse_args()
    options.lengths = options.lengths or ([1024] if options.tiny else [4096, 16384])
    return options


if __name__ == "__main__":
    main()
