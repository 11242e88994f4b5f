"""Seconds to first token of one request: plain vLLM, its OffloadingConnector and ours, one after the other.

    python -m benchmarks.gpu.ttft [--lengths 4096,8192,16384,32768] [--runs 5] [--variants plain,offloading,ours,server]

A prompt is 48 tokens of system prompt, documents of 1,024 tokens and a question of 32: 4,176, 8,272, 16,464 and 32,848
tokens. ``cold`` was never seen; ``reload`` is the same prompt once more, after every store has ended and vLLM's own
prefix cache was emptied; ``reload, exact`` is one that asks for no blending, for with CacheBlend on the end of the
prompt, which fills no chunk, may be blended. The ``blend`` cells ask over known documents in a new order, each
computed before alone behind the system prompt. Before anything is timed, a connector's host memory is filled once, so
that it is pinned and full, as it is in a server that runs for a while. Of each cell one run ahead of ``--runs`` is not
counted. ``server`` is ours with an ``lmcache server``, a process of its own, in place of memory of the engine's own.
``--variants`` also knows ``prefix``: ours with CacheBlend off.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.engine import Answer, Engine, started
from benchmarks.gpu.prompts import QUESTION_TOKENS, SYSTEM_TOKENS, Prompts
from benchmarks.gpu.setup import OFFLOADING, OURS, PLAIN, SERVER, WITH_BLENDING, Setup, parser, whole_numbers
from benchmarks.gpu.variants import Cell, replies, run_variants

RELOAD, EXACT_RELOAD = "reload", "reload, exact"
BLENDS: dict[str, dict[str, Any]] = {
    "blend 15 %": {"lmcache.blend_ratio": 0.15},
    "blend 5 %": {"lmcache.blend_ratio": 0.05},
    "kv_deviation 15 %": {
        "lmcache.blend_ratio": 0.15,
        "lmcache.blend_policy": "kv_deviation",
        "lmcache.blend_corrector": "none",
    },
    "kv_deviation 5 %": {
        "lmcache.blend_ratio": 0.05,
        "lmcache.blend_policy": "kv_deviation",
        "lmcache.blend_corrector": "none",
    },
}
REUSED_AT_LEAST = 0.9
"""Share of a prompt that must come from the store in a ``reload`` or a blend; otherwise the cell says so."""


def measure(engine: Engine, lengths: list[int], runs: int, document: int) -> Iterator[Cell]:
    prompts = Prompts(engine.setup)
    stores = engine.setup.variant != PLAIN
    if stores:
        engine.fill(prompts.tokens, max(lengths))
    for length in lengths:
        yield from cold_and_reload(engine, prompts, length // document * document, runs, stores)
    if engine.setup.variant in WITH_BLENDING:
        yield from blends(engine, prompts, lengths, runs, document)


def cold_and_reload(engine: Engine, prompts: Prompts, length: int, runs: int, stores: bool) -> Iterator[Cell]:
    cold: list[Answer] = []
    again: dict[str, list[Answer]] = {}
    if stores:
        again[RELOAD] = []
    if engine.setup.variant == OURS:
        again[EXACT_RELOAD] = []
    for _ in range(runs + 1):
        prompt = prompts.tokens(SYSTEM_TOKENS + length + QUESTION_TOKENS)
        cold.append(engine.ask(prompt))
        engine.forget()
        for kind, given in again.items():
            given.append(engine.ask(prompt, {"lmcache.blend": False} if kind == EXACT_RELOAD else None))
            engine.forget()
    yield cell("cold", len(prompt), cold, all(answer.cached_tokens == 0 for answer in cold))
    for kind, given in again.items():
        same = all(first.tokens == second.tokens for first, second in zip(cold, given, strict=True))
        yield {**cell(kind, len(prompt), given, reused(given, len(prompt))), "same_token": same}


def blends(engine: Engine, prompts: Prompts, lengths: list[int], runs: int, document: int) -> Iterator[Cell]:
    documents = prompts.documents(max(lengths) // document, document)
    for known in documents:
        engine.ask([*prompts.system, *known], {"lmcache.blend": False})
        engine.forget()
    for length in lengths:
        answers: dict[str, list[Answer]] = {name: [] for name in BLENDS}
        for _ in range(runs + 1):
            for name, params in BLENDS.items():
                prompt = prompts.over(documents, length // document)
                answers[name].append(engine.ask(prompt, params))
                engine.forget()
        for name, given in answers.items():
            yield cell(name, len(prompt), given, reused(given, len(prompt)) and not any(map(fell_back, given)))


def reused(answers: list[Answer], tokens: int) -> bool:
    """By our own report where there is one."""
    counts = (answer.cached_tokens if answer.report is None else answer.report["reused_tokens"] for answer in answers)
    return all(count >= REUSED_AT_LEAST * tokens for count in counts)


def fell_back(answer: Answer) -> bool:
    blend = (answer.report or {}).get("blend") or {}
    return blend.get("fallback", "no blend") is not None


def cell(kind: str, tokens: int, answers: list[Answer], sound: bool) -> Cell:
    """``sound``: it is what its name says."""
    counted = answers[1:]
    return {
        "kind": kind,
        "tokens": tokens,
        "seconds": statistics.median(answer.seconds for answer in counted),
        "each": [answer.seconds for answer in counted],
        "warm_up": answers[0].seconds,
        "sound": sound,
        "cached_tokens": [answer.cached_tokens for answer in counted],
        "loop_milliseconds": [answer.loop_milliseconds for answer in counted],
        "milliseconds": phases(counted),
        "reports": [answer.report for answer in counted],
    }


def phases(answers: list[Answer]) -> dict[str, float]:
    """Medians of what our report says of a blend's phases."""
    spent = [((answer.report or {}).get("blend") or {}).get("milliseconds") or {} for answer in answers]
    return {name: statistics.median(one.get(name, 0.0) for one in spent) for name in spent[0]}


def line(cell: Cell) -> str:
    each = " ".join(f"{seconds:.4f}" for seconds in sorted(cell["each"]))
    parts = [f"{cell['variant']:10} {cell['kind']:17} {cell['tokens']:6} tokens {cell['seconds']:.4f} s  [{each}]"]
    parts.append(f"host {statistics.median(cell['loop_milliseconds']):.2f}")
    if not cell["sound"]:
        parts.append(f"NOT SOUND: reused {cell['cached_tokens']}, {cell['reports'][0]}")
    if cell.get("same_token") is False:
        parts.append("another first token than cold")
    if cell["milliseconds"]:
        parts.append("ms: " + ", ".join(f"{name} {spent:.1f}" for name, spent in cell["milliseconds"].items()))
    return "  ".join(parts)


def main() -> None:
    options = arguments(parser(__doc__, [PLAIN, OFFLOADING, OURS, SERVER], host_gib=16))
    document = 512 if options.tiny else 1024
    longest = max(options.lengths) + 4096
    if options.variant is None:
        settings = {
            "runs": options.runs,
            "document_tokens": document,
            "host_gib": options.host_gib,
            "graphs": options.graphs,
            "tiny": options.tiny,
            "extra": options.extra,
            "dynamic": options.dynamic,
            "kv_cache_dtype": options.kv_cache_dtype,
        }
        run_variants("ttft", options.variants, options.out, settings, options.limit, line)
        return
    reply = replies(options.limit)
    engine = Engine(Setup.of(options, options.variant, longest, longest))
    reply(started(engine))
    for found in measure(engine, options.lengths, options.runs, document):
        reply(found)


def arguments(found: argparse.ArgumentParser) -> argparse.Namespace:
    found.add_argument("--lengths", type=whole_numbers)
    found.add_argument("--runs", type=int)
    options = found.parse_args()
    options.lengths = options.lengths or ([1024, 2048] if options.tiny else [4096, 8192, 16384, 32768])
    options.runs = options.runs or (2 if options.tiny else 5)
    if options.tiny:
        options.host_gib = min(options.host_gib, 0.0625)
    return options


if __name__ == "__main__":
    main()
