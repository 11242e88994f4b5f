"""How long it takes to name a prompt: microseconds per 1,000 tokens of `prefix_keys` and `segment_key`.

    python benchmarks/keys.py

Beside each figure stands its floor: the calls of blake3 alone, one for each chunk, on bytes that are already there.
A chunk of 256 tokens is 1 KiB, which is one BLAKE3 chunk: its compressions depend on each other, so that SIMD does not
help. A segment is hashed in one call, where it does.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from blake3 import blake3
from rich.console import Console
from rich.table import Table

from lmcache.keys import Namespace, prefix_keys, segment_key

CHUNK_SIZE = 256
LENGTHS = (8_192, 131_072)
RUNS = 31
VOCABULARY = 128_256


def microseconds_per_1000(work: Callable[[], object], num_tokens: int) -> float:
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e9 / num_tokens


def main() -> None:
    namespace = Namespace(model="benchmark", kv_dtype="bfloat16", layout="token-major-1")
    choose = random.Random(0)
    table = Table(title=f"µs per 1,000 tokens (median of {RUNS} runs, chunks of {CHUNK_SIZE} tokens)")
    for column in ("tokens", "input", "prefix_keys", "segment_key", "blake3 alone, per chunk"):
        table.add_column(column, justify="right")
    for length in LENGTHS:
        tokens = [choose.randrange(VOCABULARY) for _ in range(length)]
        tensor = torch.tensor(tokens)
        inputs = {"list": tokens, "int64 tensor": tensor, "int32 array": tensor.numpy().astype(np.int32)}
        chunk, key = bytes(4 * CHUNK_SIZE), bytes(32)

        def hash_only(calls: int = length // CHUNK_SIZE, chunk: bytes = chunk, key: bytes = key) -> None:
            for _ in range(calls):
                blake3(chunk, key=key).digest()

        floor = microseconds_per_1000(hash_only, length)
        for name, value in inputs.items():
            figures = [
                microseconds_per_1000(lambda value=value: prefix_keys(namespace, value, CHUNK_SIZE), length),
                microseconds_per_1000(lambda value=value: segment_key(namespace, value), length),
                floor,
            ]
            table.add_row(f"{length:,}", name, *(f"{figure:.1f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
