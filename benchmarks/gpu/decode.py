"""Tokens a second of 32 requests that decode together, while another prompt of 8,192 tokens comes every few steps.

    python -m benchmarks.gpu.decode [--runs 3] [--every 20] [--variants plain,ours]

The 32 requests have 1,024 tokens of prompt each and write 256. The clock runs from when each has written 16 tokens to
when all have their last. Beside them come, a prompt every 20 steps of the engine and so in every variant at the same
points of the same work: ``nothing``; ``new prompts``, which plain vLLM computes and ours computes and stores; ``known
prompts``, the same ones again, which plain vLLM computes again and ours loads. vLLM's own prefix cache is off, so that
it does not answer in their place. One shorter run of each is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from benchmarks.gpu.engine import Engine, started
from benchmarks.gpu.fast_core import fast_core
from benchmarks.gpu.prompts import Prompts, Tokens
from benchmarks.gpu.setup import LABELS, OURS, PLAIN, Setup, parser
from benchmarks.gpu.stream import Request, Stream
from benchmarks.gpu.variants import Cell, replies, run_variants

AHEAD = 16
NOTHING, NEW, KNOWN = "nothing", "new prompts", "known prompts"


class Scale:
    """Numbers of requests and tokens."""

    def __init__(self, tiny: bool) -> None:
        self.requests = 4 if tiny else 32
        self.prompt = 256 if tiny else 1024
        self.output = 32 if tiny else 256
        self.background = 1024 if tiny else 8192


def measure(engine: Engine, scale: Scale, runs: int, every: int) -> Iterator[Cell]:
    prompts = Prompts(engine.setup, "decode")
    if engine.setup.variant != PLAIN:
        engine.fill(prompts.tokens, scale.background)
    speeds: dict[str, list[float]] = {NOTHING: [], NEW: [], KNOWN: []}
    beside: dict[str, list[Request]] = {NOTHING: [], NEW: [], KNOWN: []}
    for run in range(-1, runs):
        output = scale.output if run >= 0 else 2 * every
        background = prompts.documents(scale.output // every + 1, scale.background)
        for kind in speeds:
            decoding = prompts.documents(scale.requests, scale.prompt)
            speed, others = tokens_a_second(engine, decoding, output, [] if kind == NOTHING else background, every)
            if run >= 0:
                speeds[kind].append(speed)
                beside[kind] += others
    for kind, found in speeds.items():
        reused = [request.cached_tokens for request in beside[kind]]
        loads = engine.setup.variant != PLAIN and kind == KNOWN
        yield {
            "kind": kind,
            "tokens_a_second": statistics.median(found),
            "each": found,
            "beside": len(reused),
            "cached_tokens": reused,
            "seconds_beside": [(request.last or 0.0) - request.arrival for request in beside[kind]],
            "sound": all((count > 0.9 * scale.background) if loads else count == 0 for count in reused),
        }


def tokens_a_second(
    engine: Engine, decoding: list[Tokens], output: int, background: list[Tokens], every: int
) -> tuple[float, list[Request]]:
    """The speed of ``decoding``, and what became of the prompts beside."""
    stream = Stream(engine)
    requests = [stream.add(prompt, output) for prompt in decoding]
    while any(request.tokens < min(AHEAD, output // 4) for request in requests):
        stream.step()  # their own prompts are computed and stored now
    waiting, others, steps = list(reversed(background)), list[Request](), 0
    with fast_core():
        before, start = sum(request.tokens for request in requests), time.perf_counter()
        while any(request.last is None for request in requests):
            if waiting and steps % every == 0:
                others.append(stream.add(waiting.pop(), 1))
            stream.step()
            steps += 1
        seconds = time.perf_counter() - start
    stream.drain()
    return (sum(request.tokens for request in requests) - before) / seconds, others


def line(cell: Cell) -> str:
    each = " ".join(f"{speed:.0f}" for speed in cell["each"])
    text = f"{LABELS[cell['variant']]:20} beside: {cell['kind']:13} {cell['tokens_a_second']:7.0f} tokens/s  [{each}]"
    return text if cell["sound"] else f"{text}  NOT SOUND: reused {cell['cached_tokens']}"


def main() -> None:
    found = parser(__doc__, [PLAIN, OURS], host_gib=32)
    found.add_argument("--runs", type=int, default=3)
    found.add_argument("--every", type=int, default=20, help="engine steps between two prompts (default %(default)s)")
    found.add_argument("--batched-tokens", type=int, default=8192, help="vLLM's max_num_batched_tokens")
    options = found.parse_args()
    if options.tiny:
        options.host_gib, options.every = min(options.host_gib, 0.25), 8
    scale = Scale(options.tiny)
    if options.variant is None:
        settings = {
            **vars(scale),
            "runs": options.runs,
            "every": options.every,
            "graphs": options.graphs,
            "tiny": options.tiny,
        }
        run_variants("decode", options.variants, options.out, settings, options.limit, line)
        return
    reply = replies(options.limit)
    longest = scale.background + scale.output
    engine = Engine(Setup.of(options, options.variant, longest, options.batched_tokens, prefix_caching=False))
    reply(started(engine))
    for cell in measure(engine, scale, options.runs, options.every):
        reply(cell)


if __name__ == "__main__":
    main()
