"""How long it takes to name a prompt: microseconds for each 1,000 tokens.

The floor beside each figure is blake3 alone, one call a chunk (one a prompt for a segment), on bytes that lie ready. A
chunk of 256 tokens is 1 KiB: one BLAKE3 chunk, whose compressions depend on each other, so that SIMD does not help.
"""

from __future__ import annotations

from functools import partial

import torch
from blake3 import blake3

from lmcache.bench.rows import Row
from lmcache.bench.settings import Settings
from lmcache.bench.shapes import CHUNK_SIZE, random_prompt
from lmcache.bench.timing import Work, median, share, take_turns
from lmcache.keys import Namespace, prefix_keys, segment_key

LENGTHS = (8_192, 131_072)
MAX_MICROSECONDS = 10.0
RUNS_PER_RUN = 5
"""A run takes a millisecond, so more of them are affordable."""

_ROOT = bytes(32)


def measure_keys(settings: Settings) -> list[Row]:
    namespace = Namespace(model="bench", kv_dtype="bfloat16", layout="token-major-1")
    rows = []
    for length in LENGTHS:
        prompt = random_prompt(length, length)
        chunk, whole = bytes(4 * CHUNK_SIZE), bytes(4 * length)
        for name, tokens in {"list": prompt.tolist(), "int64 tensor": torch.from_numpy(prompt)}.items():
            taken = take_turns(
                {
                    "prefix": Work(partial(prefix_keys, namespace, tokens, CHUNK_SIZE)),
                    "chunks alone": Work(partial(_hash, chunk, length // CHUNK_SIZE)),
                    "segment": Work(partial(segment_key, namespace, tokens)),
                    "whole alone": Work(partial(_hash, whole, 1)),
                },
                settings.runs * RUNS_PER_RUN,
            )
            scale = 1e9 / length
            rows += [
                Row(
                    subject="keys",
                    figure=f"{figure} keys",
                    case=f"{length:,} tokens, {name}",
                    unit="µs per 1,000 tokens",
                    value=median(taken[figure]) * scale,
                    baseline="blake3 alone",
                    raw=median(taken[floor]) * scale,
                    share=share(taken[figure], taken[floor]),
                    max_value=MAX_MICROSECONDS,
                )
                for figure, floor in (("prefix", "chunks alone"), ("segment", "whole alone"))
            ]
    return rows


def _hash(data: bytes, calls: int) -> None:
    for _ in range(calls):
        blake3(data, key=_ROOT).digest()
