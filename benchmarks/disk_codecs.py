"""What a codec and encryption cost on disk, and what they save: GB/s of KV through the disk tier.

usage: python -m benchmarks.disk_codecs --model FOLDER [--directory DIR] [--runs N] [--json FILE]

Chunks of 256 tokens of real prompts (the tasks of ``lmcache evaluate``), in bfloat16. Writing ends when the last chunk
is in its file, packed by the tier's writing threads; reading when the last one is in memory as it was, eight under way
at once. All of them take turns in each run, with O_DIRECT where the file system has it; medians over the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.codecs import CHUNK, prompt_kv
from lmcache.bench.disk import READ_WINDOW, get_all, put_all
from lmcache.bench.machine import describe_machine
from lmcache.bench.timing import Work, take_turns
from lmcache.evaluation.prompt_parts import prompt_parts
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.codecs import CODEC_NAMES, make_codec
from lmcache.storage.disk import DiskSettings, LocalDiskTier
from lmcache.storage.encryption import KeyRing
from lmcache.storage.policies import make_policy

SOURCES, COUNT = 16, 96
"""Different chunks, and how many are written."""


def real_chunks(model_path: Path, pool: SlabAllocator) -> list[MemoryObj]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    chunks: list[MemoryObj] = []
    for task in generate_tasks(SOURCES, seed=40):
        kv = prompt_kv(model, torch.tensor([prompt_parts(tokenizer, task).input_ids]))
        for start in range(0, kv.shape[2] - CHUNK + 1, CHUNK):
            part = kv[:, :, start : start + CHUNK]
            obj = pool.allocate(KVSpec(tuple(part.shape), part.dtype, TOKEN_MAJOR, CHUNK))
            assert obj is not None
            obj.tensor.copy_(part)
            chunks.append(obj)
            if len(chunks) == SOURCES:
                return chunks
    raise RuntimeError(f"the prompts have fewer than {SOURCES} chunks")


def formats() -> dict[str, Callable[[], ChunkFormat]]:
    plain: dict[str, Callable[[], ChunkFormat]] = {
        name: partial(lambda name: ChunkFormat(make_codec(name)), name) for name in CODEC_NAMES
    }
    return plain | {"raw, encrypted": lambda: ChunkFormat(make_codec("raw"), KeyRing({"one": os.urandom(32)}))}


@contextmanager
def tier_of(directory: Path, pool: SlabAllocator, packed: ChunkFormat, nbytes: int) -> Iterator[LocalDiskTier]:
    settings = DiskSettings(directory, capacity_bytes=nbytes, write_queue_bytes=1 << 40)
    tier = LocalDiskTier(settings, pool.allocate, make_policy("LRU"), packed)
    try:
        yield tier
        if failures := tier.stats().failures:
            raise RuntimeError(f"the disk tier failed: {failures}")
    finally:
        tier.close()


def measure(model: Path, directory: Path, runs: int) -> dict[str, dict[str, list[float]]]:
    """GB/s of KV ``written`` and ``read`` by what packs it, and how many ``times`` smaller it was."""
    pool = SlabAllocator(1 << 30, pin_memory=False)
    chunks = real_chunks(model, pool)
    nbytes = COUNT * chunks[0].spec.nbytes
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix="lmcache-codecs-")))
        tiers = {
            name: stack.enter_context(tier_of(folder / str(number), pool, make(), 2 * nbytes))
            for number, (name, make) in enumerate(formats().items())
        }

        def forget(tier: LocalDiskTier) -> None:
            tier.clear()
            tier.flush()

        writes = {
            name: Work(partial(put_all, tier, chunks, COUNT), before=partial(forget, tier))
            for name, tier in tiers.items()
        }
        written = take_turns(writes, runs)
        taken = {name: tier.stats().used_bytes for name, tier in tiers.items()}
        read = take_turns({name: Work(partial(get_all, tier, COUNT)) for name, tier in tiers.items()}, runs)
    return {
        name: {
            "written": [nbytes / seconds / 1e9 for seconds in written[name]],
            "read": [nbytes / seconds / 1e9 for seconds in read[name]],
            "times": [nbytes / taken[name]],
        }
        for name in tiers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk to be measured (default: here)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(given.model, given.directory, given.runs)
    table = Table(title=f"{COUNT} chunks of {given.model.name}, {READ_WINDOW} read at once; {describe_machine()}")
    for name in ("packed", "on disk", "written GB/s", "read GB/s"):
        table.add_column(name, justify="left" if name == "packed" else "right")
    for name, of in figures.items():
        table.add_row(name, f"1 / {of['times'][0]:.2f}", f"{median(of['written']):.2f}", f"{median(of['read']):.2f}")
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
