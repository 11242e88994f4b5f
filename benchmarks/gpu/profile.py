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

FUNCTIONS, KERNELS = 40, 25


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
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if str(event.device_type).endswith("CUDA")
    )
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    if spans:
        whole = reached - spans[0][0]
        out.print(f"{len(spans)} kernels and copies; the GPU is busy for {busy / 1e3:.1f} of {whole / 1e3:.1f} ms")


def main() -> None:
    options = arguments(parser(__doc__, [OURS], host_gib=8))
    document = 512 if options.tiny else 1024
    longest = max(options.lengths) + 4096
    setup = Setup(
        OURS, options.host_gib, longest, longest, graphs=options.graphs, tiny=options.tiny, extra=options.extra
    )
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
