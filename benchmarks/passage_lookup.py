"""How long it takes to find the known passages of a prompt, by how many chunks are known.

python benchmarks/passage_lookup.py [--chunks 300000] [--chunk-size 256] [--prompt 16000] [--runs 30] [--json FILE]

The known chunks are prompts of 32 chunks each, random tokens. A new prompt is passages of 1,500 tokens of them, at
other places and cut otherwise, between texts that nobody has seen; every run takes another prompt, so that nothing of
it is in the processor's cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmcache.bench.machine import describe_machine
from lmcache.bench.timing import Work, take_turns
from lmcache.keys import Namespace, prefix_keys
from lmcache.segmentation.known_passages import KnownChunk, KnownPassages

MAX_MICROSECONDS = 150.0  # for 1,000 tokens of a prompt, with a million chunks

_NAMESPACE = Namespace("model", "bfloat16", "layout")
_CHUNKS_A_PROMPT = 32
_PASSAGE, _UNKNOWN = 1500, 500
_VOCABULARY = 128_000

Tokens = npt.NDArray[np.uint32]


def _text(count: int, *seed: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, _VOCABULARY, count, np.uint32)


def known_chunks(chunks: int, chunk_size: int) -> KnownPassages:
    known = KnownPassages(chunk_size, lambda key: True)
    for number in range(-(-chunks // _CHUNKS_A_PROMPT)):
        tokens = _text(min(_CHUNKS_A_PROMPT, chunks - number * _CHUNKS_A_PROMPT) * chunk_size, 0, number)
        keys = prefix_keys(_NAMESPACE, tokens, chunk_size)
        starts = range(0, len(tokens), chunk_size)
        known.add_prompt(
            [KnownChunk(key, tokens[at : at + chunk_size], at) for key, at in zip(keys, starts, strict=True)]
        )
    return known


def new_prompt(number: int, length: int, chunks: int, chunk_size: int) -> tuple[Tokens, int]:
    """A prompt, and how many of its tokens are known."""
    random = np.random.default_rng((1, number))
    full_prompts = chunks // _CHUNKS_A_PROMPT
    parts: list[Tokens] = []
    for part in range(-(-length // (_PASSAGE + _UNKNOWN))):
        stored = _text(_CHUNKS_A_PROMPT * chunk_size, 0, int(random.integers(full_prompts)))
        start = int(random.integers(len(stored) - _PASSAGE))
        parts += [_text(_UNKNOWN, 2, number, part), stored[start : start + _PASSAGE]]
    is_known = np.concatenate([np.full(len(part), at % 2) for at, part in enumerate(parts)])[:length]
    return np.concatenate(parts)[:length], int(is_known.sum())


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def measure(chunks: int, chunk_size: int, length: int, runs: int) -> dict[str, object]:
    before, began = resident_bytes(), time.perf_counter()
    known = known_chunks(chunks, chunk_size)
    filling = time.perf_counter() - began
    used = resident_bytes() - before

    prompts = [new_prompt(number, length, chunks, chunk_size) for number in range(runs + 1)]
    found = present = 0
    for tokens, in_it in prompts:
        present += in_it
        found += sum(match.end - match.start for match in known.find(tokens, _NAMESPACE.id))
    hits, misses = itertools.cycle(prompts), itertools.cycle(_text(length, 3, number) for number in range(runs + 1))
    taken = take_turns(
        {
            "passages": Work(lambda: known.find(next(hits)[0], _NAMESPACE.id)),
            "nothing known": Work(lambda: known.find(next(misses), _NAMESPACE.id)),
        },
        runs,
    )
    return {
        "machine": describe_machine(),
        "chunks": len(known),
        "chunk_size": chunk_size,
        "prompt_tokens": length,
        "bytes_a_chunk": used / chunks,
        "adding_microseconds_a_chunk": filling / chunks * 1e6,
        "found": found / present,
        "microseconds_a_thousand_tokens": {
            name: statistics.median(seconds) * 1e9 / length for name, seconds in taken.items()
        },
        "at_most": MAX_MICROSECONDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--chunks", type=int, default=300_000, help="at least 32; a million take 2 GB of host memory")
    parser.add_argument("--chunk-size", type=int, default=256, help="tokens, at least 64")
    parser.add_argument("--prompt", type=int, default=16_000, help="tokens of a new prompt")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.chunks < _CHUNKS_A_PROMPT or arguments.chunk_size < 64:
        parser.error(f"--chunks must be at least {_CHUNKS_A_PROMPT}, --chunk-size at least 64")
    figures = measure(arguments.chunks, arguments.chunk_size, arguments.prompt, arguments.runs)
    print(
        f"{figures['machine']}\n{figures['chunks']:,} chunks of {figures['chunk_size']} tokens, "
        f"{figures['bytes_a_chunk']:.0f} bytes each, added in {figures['adding_microseconds_a_chunk']:.0f} µs each\n"
        f"{figures['found']:.2%} of the known tokens of prompts of {figures['prompt_tokens']:,} found"
    )
    for name, figure in figures["microseconds_a_thousand_tokens"].items():  # type: ignore[attr-defined]
        print(f"{name}: {figure:.1f} µs for 1,000 tokens (at most {figures['at_most']:.0f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
