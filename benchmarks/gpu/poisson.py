"""Requests of a RAG service that come when they like: time to first token and requests served, at several rates.

    python -m benchmarks.gpu.poisson [--rates 1,2,4,6,8,12,16] [--window 15] [--variants plain,offloading,prefix,blend]

A request has 48 tokens of system prompt, 6 of 50 documents of 1,000 tokens in any order and a question of 32, and
writes 16 tokens. They arrive as a Poisson stream for ``--window`` seconds; the same requests at the same times in every
variant. Time counts from when a request was to arrive. Every document was asked for once before, alone behind the
system prompt, and a few requests went ahead; vLLM's own prefix cache is on throughout. What has no first token after
``--grace`` more seconds is given up and counts with the time that it had waited. A variant's rates end with the first
at which the 99th percentile passes ``--stop`` seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import accumulate, takewhile
from typing import Any

from benchmarks.gpu.engine import Engine, started
from benchmarks.gpu.fast_core import fast_core
from benchmarks.gpu.prompts import Prompts, Tokens
from benchmarks.gpu.setup import BLEND, LABELS, OFFLOADING, PLAIN, PREFIX_ONLY, Setup, numbers, parser
from benchmarks.gpu.stream import Request, Stream
from benchmarks.gpu.variants import Cell, replies, run_variants

CHOSEN, OUTPUT_TOKENS, AHEAD = 6, 16, 4


def measure(
    engine: Engine, documents: list[Tokens], rates: list[float], window: float, grace: float, stop: float, ratio: float
) -> Iterator[Cell]:
    blends = engine.setup.variant == BLEND
    params = {"lmcache.blend_ratio": ratio} if blends else None
    prompts = Prompts(engine.setup)
    if engine.setup.variant != PLAIN:
        engine.fill(Prompts(engine.setup, "fill").tokens, CHOSEN * len(documents[0]))
    for document in documents:
        engine.ask([*prompts.system, *document])
    engine.settle()
    for _ in range(AHEAD):
        engine.ask(prompts.over(documents, CHOSEN), params, OUTPUT_TOKENS)
    engine.settle()
    for rate in rates:
        asked, seconds = offer(engine, documents, rate, window, grace, params)
        found = figures(asked, rate, window, seconds)
        if blends:
            found["blended"] = sum(was_blended(request) for request in asked)
            found["sound"] = found["blended"] >= 0.9 * found["finished"]
        yield found
        if found["p99"] > stop:
            return


def offer(
    engine: Engine, documents: list[Tokens], rate: float, window: float, grace: float, params: dict[str, Any] | None
) -> tuple[list[Request], float]:
    """All requests, their times counted from the stream's start, and when it was over."""
    prompts = Prompts(engine.setup, f"rate {rate:g}")
    prompts.system = Prompts(engine.setup).system
    after = list(takewhile(lambda at: at < window, accumulate(prompts.gaps(rate, int(4 * rate * window) + 20))))
    coming = [(at, prompts.over(documents, CHOSEN)) for at in reversed(after)]
    stream, asked = Stream(engine), list[Request]()
    with fast_core():
        start = time.perf_counter()
        while coming or len(stream):
            now = time.perf_counter() - start
            while coming and coming[-1][0] <= now:
                at, prompt = coming.pop()
                asked.append(stream.add(prompt, OUTPUT_TOKENS, params, arrival=start + at))
            if now > window + grace:
                break
            if len(stream) or engine.has_work:
                stream.step()
            else:
                time.sleep(max(0.0, min(0.001, coming[-1][0] - now)))
        seconds = time.perf_counter() - start
    stream.abort()
    for request in asked:
        request.arrival -= start
        request.first = None if request.first is None else request.first - start
        request.last = None if request.last is None else request.last - start
    return asked, seconds


def figures(asked: list[Request], rate: float, window: float, seconds: float) -> Cell:
    waits = sorted((seconds if request.first is None else request.first) - request.arrival for request in asked)
    cuts = statistics.quantiles(waits, n=100, method="inclusive") if len(waits) > 1 else waits * 99
    return {
        "kind": f"{rate:g} a second",
        "rate": rate,
        "window": window,
        "requests": len(asked),
        "finished": sum(request.last is not None for request in asked),
        "p50": cuts[49],
        "p99": cuts[98],
        "served_a_second": sum(request.last is not None and request.last <= window for request in asked) / window,
        "sound": True,
        "each": [None if request.first is None else request.first - request.arrival for request in asked],
        "cached_tokens": [request.cached_tokens for request in asked],
    }


def was_blended(request: Request) -> bool:
    blend = (request.report or {}).get("blend") or {}
    return blend.get("fallback", "no blend") is None


def line(cell: Cell) -> str:
    text = (
        f"{LABELS[cell['variant']]:20} {cell['kind']:12} {cell['requests']:4} requests, {cell['finished']} ended; "
        f"first token p50 {cell['p50']:.3f} s, p99 {cell['p99']:.3f} s; {cell['served_a_second']:.2f} served a second"
    )
    if "blended" in cell:
        text += f"; {cell['blended']} blended"
    return text if cell["sound"] else f"{text}  NOT SOUND: too few were blended"


def main() -> None:
    found = parser(__doc__, [PLAIN, OFFLOADING, PREFIX_ONLY, BLEND], host_gib=32)
    found.add_argument("--rates", type=numbers, help="requests a second, ascending")
    found.add_argument("--window", type=float, default=15.0, help="seconds of arrivals (default %(default)s)")
    found.add_argument("--grace", type=float, default=10.0, help="seconds after it (default %(default)s)")
    found.add_argument("--stop", type=float, default=2.0, help="seconds to first token (default %(default)s)")
    found.add_argument("--ratio", type=float, default=0.15, help="share that a blend computes (default %(default)s)")
    found.add_argument("--batched-tokens", type=int, default=8192, help="vLLM's max_num_batched_tokens")
    options = found.parse_args()
    options.rates = options.rates or ([2, 20] if options.tiny else [1, 2, 4, 6, 8, 12, 16])
    number, length = (10, 300) if options.tiny else (50, 1000)
    if options.tiny:
        options.host_gib, options.window, options.grace = min(options.host_gib, 0.25), min(options.window, 3), 2
    if options.variant is None:
        settings = {
            "documents": number,
            "document_tokens": length,
            "chosen": CHOSEN,
            "output_tokens": OUTPUT_TOKENS,
            "window": options.window,
            "grace": options.grace,
            "stop": options.stop,
            "ratio": options.ratio,
            "graphs": options.graphs,
            "tiny": options.tiny,
        }
        run_variants("poisson", options.variants, options.out, settings, options.limit, line)
        return
    reply = replies(options.limit)
    setup = Setup.of(options, options.variant, CHOSEN * length + 1024, options.batched_tokens)
    engine = Engine(setup)
    reply(started(engine))
    documents = Prompts(setup, "documents").documents(number, length)
    for cell in measure(engine, documents, options.rates, options.window, options.grace, options.stop, options.ratio):
        reply(cell)


if __name__ == "__main__":
    main()
