"""When the host and when the GPU come to which point of a blend: how far the host is ahead, and who waits for whom.

    python -m benchmarks.gpu.timeline --graphs full [--lengths 4096,8192,16384] [--ratios 0.15,0.05]

Milliseconds since the request was handed in, by the host's clock when it has queued a point's work, and by CUDA events
when the GPU is done with what was queued before. Where both are alike the GPU has waited for the host. Of several
requests the one in the middle by its time to first token is shown. Without a GPU only the host's are.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.engine import Engine
from benchmarks.gpu.prompts import Prompts, Tokens
from benchmarks.gpu.setup import OURS, Setup, numbers, parser, whole_numbers

LAST = "first token"
LAYERS = (0, 1, 2, 3, 8, 16, 24)


@dataclass(frozen=True)
class Point:
    name: str
    seconds: float
    event: Any


class Timeline:
    """The points of one request, by functions that mark when they begin and end."""

    def __init__(self) -> None:
        self.points: list[Point] = []

    def mark(self, name: str) -> None:
        import torch

        event = None
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.points.append(Point(name, time.perf_counter(), event))

    def around(self, owner: Any, attribute: str, before: str, after: str) -> None:
        """For the rest of the process."""
        call = getattr(owner, attribute)

        @functools.wraps(call)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self.mark(before)
            try:
                return call(*args, **kwargs)
            finally:
                self.mark(after)

        setattr(owner, attribute, marked)

    def watch(self) -> None:
        from vllm import LLM

        from lmcache.blend import blend_pass, forwards, score_attention
        from lmcache.integration.vllm import scheduler_side, worker_side
        from lmcache.integration.vllm.blend.blender import Blender

        self.around(LLM, "generate", "request", LAST)
        self.around(scheduler_side.SchedulerSide, "get_num_new_matched_tokens", "look up", "looked up")
        self.around(worker_side.WorkerSide, "start_load_kv", "load", "blended")
        self.around(Blender, "_blend", "blend", "last blend queued")
        self.around(blend_pass._Blend, "_select", "select", "selected")
        self.around(worker_side.WorkerSide, "wait_for_save", "vLLM's forward queued", "saves queued")
        received = score_attention.ScoreAttention.received.fget
        assert received is not None

        def waited(forward: score_attention.ScoreAttention) -> Any:
            self.mark("wait for scores")
            try:
                return received(forward)
            finally:
                self.mark("scores are there")

        patch.object(score_attention.ScoreAttention, "received", property(waited)).start()
        patch.object(forwards.BlendForward, "_attend", self._attending(forwards.BlendForward._attend)).start()

    def _attending(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        def marked(forward: Any, piece: Any, layer_id: int, *args: Any, **kwargs: Any) -> Any:
            if layer_id in LAYERS:
                self.mark(f"{type(forward).__name__} {layer_id}")
            return attend(forward, piece, layer_id, *args, **kwargs)

        return marked

    def told(self) -> list[str]:
        """A line a point."""
        first = self.points[0]
        lines = []
        for point in self.points:
            line = f"  {point.name:24}{1e3 * (point.seconds - first.seconds):8.1f}"
            if point.event is not None:
                line += f"{first.event.elapsed_time(point.event):8.1f}"
            lines.append(line)
        return lines


def look_at(engine: Engine, timeline: Timeline, ask: Callable[[], Tokens], ratio: float, runs: int) -> list[str]:
    found = []
    for run in range(runs + 1):
        prompt = ask()
        timeline.points.clear()
        answer = engine.ask(prompt, {"lmcache.blend_ratio": ratio})
        if run:
            found.append((answer.seconds, timeline.told()))
        engine.forget()
    middle = statistics.median_low(seconds for seconds, _ in found)
    return next(lines for seconds, lines in found if seconds == middle)


def main() -> None:
    options = arguments(parser(__doc__, [OURS], host_gib=8))
    document = 512 if options.tiny else 1024
    longest = max(options.lengths) + 4096
    engine = Engine(Setup.of(options, OURS, longest, longest))
    prompts = Prompts(engine.setup)
    documents = prompts.documents(max(options.lengths) // document, document)
    for known in documents:
        engine.ask([*prompts.system, *known], {"lmcache.blend": False})
        engine.forget()
    timeline = Timeline()
    timeline.watch()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "timeline.txt").open("w") as file:
        for length in options.lengths:
            for ratio in options.ratios:
                ask = functools.partial(prompts.over, documents, length // document)
                lines = look_at(engine, timeline, ask, ratio, options.runs)
                text = "\n".join([f"{length} tokens, {ratio:.0%}: host, GPU", *lines])
                print(text, flush=True)
                print(text, file=file, flush=True)


def arguments(found: argparse.ArgumentParser) -> argparse.Namespace:
    found.add_argument("--lengths", type=whole_numbers)
    found.add_argument("--ratios", type=numbers, default=[0.15, 0.05])
    found.add_argument("--runs", type=int, default=5)
    options = found.parse_args()
    options.lengths = options.lengths or ([1024] if options.tiny else [4096, 8192, 16384])
    return options


if __name__ == "__main__":
    main()
