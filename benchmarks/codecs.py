"""What a codec saves, how fast it is on one core, and what it costs in quality.

usage: python -m benchmarks.codecs --model FOLDER [--tasks N] [--json FILE]

The KV of real prompts (the tasks of ``lmcache evaluate``), in bfloat16 as engines keep it, in chunks of 256 tokens.
Each codec packs and unpacks all of it; then the model, in float32, goes on from what came back, for all tokens but the
last one. KL is that of the next token against the same with nothing packed, agreement that of the greedy answers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lmcache.evaluation.measures import kl_divergence, token_agreement
from lmcache.evaluation.prompt_parts import prompt_parts
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.integration.transformers.kv_cache import generation_cache
from lmcache.memory.memory_obj import KVSpec
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.codecs import CODEC_NAMES, make_codec
from lmcache.storage.codecs.interface import Codec

CHUNK = 256
ANSWER_TOKENS = 24


def through(codec: Codec, kv: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """``kv`` ``[layers, 2, tokens, heads, dim]`` as it comes back, and what that took."""
    back = torch.empty_like(kv)
    took = {"packed": 0.0, "encode": 0.0, "decode": 0.0}
    for start in range(0, kv.shape[2], CHUNK):
        chunk = kv[:, :, start : start + CHUNK].contiguous()
        spec = KVSpec(tuple(chunk.shape), chunk.dtype, TOKEN_MAJOR, chunk.shape[2])
        began = time.perf_counter()
        packed = codec.encode(chunk, spec)
        took["encode"] += time.perf_counter() - began
        room = chunk.clone()
        if packed is not None:
            began = time.perf_counter()
            codec.decode(memoryview(packed), room, spec)
            took["decode"] += time.perf_counter() - began
        took["packed"] += spec.nbytes if packed is None else len(packed)
        back[:, :, start : start + CHUNK] = room
    return back, took


@torch.no_grad()
def prompt_kv(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """bfloat16 ``[layers, 2, tokens, heads, dim]`` of the prompt ``ids`` ``[1, tokens]``."""
    layers = model(ids, logits_to_keep=1, use_cache=True).past_key_values.layers
    kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2) for layer in layers])
    return kv.to(torch.bfloat16)


@torch.no_grad()
def measure(model: Any, tokenizer: Any, tasks: int) -> dict[str, dict[str, list[float]]]:
    figures: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in CODEC_NAMES}
    stop = model.generation_config.eos_token_id
    for task in generate_tasks(tasks, seed=40):
        ids = torch.tensor([prompt_parts(tokenizer, task).input_ids])
        kv = prompt_kv(model, ids)
        expected = answer(model, ids, kv.float(), stop)
        for name in CODEC_NAMES:
            back, took = through(make_codec(name), kv)
            logits, tokens = answer(model, ids, back.float(), stop)
            error = (back.double() - kv.double()).abs()
            into = figures[name]
            into["ratio"].append(kv.nbytes / took["packed"])
            into["encode MB/s"].append(kv.nbytes / 1e6 / took["encode"])
            into["decode MB/s"].append(kv.nbytes / 1e6 / took["decode"] if took["decode"] else float("inf"))
            into["error"].append(float(error.pow(2).mean().sqrt() / kv.double().pow(2).mean().sqrt()))
            into["KL"].append(kl_divergence(expected[0], logits))
            into["agreement"].append(token_agreement(expected[1], tokens))
    return figures


def answer(model: Any, ids: torch.Tensor, kv: torch.Tensor, stop: int) -> tuple[torch.Tensor, list[int]]:
    """Logits of the next token and the greedy answer, going on from ``kv`` of all tokens but the last."""

    def cache() -> Any:
        return generation_cache(model.config, list(kv[:, 0]), list(kv[:, 1]))

    logits = model(ids[:, -1:], past_key_values=cache(), logits_to_keep=1).logits[0, -1]
    row = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache(),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
    )[0, ids.shape[1] :].tolist()
    return logits, row[: row.index(stop) + 1] if stop in row else row


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    figures = measure(model, AutoTokenizer.from_pretrained(given.model), given.tasks)
    table = Table(title=f"{given.model.name}, {given.tasks} prompts, one core", title_justify="left")
    for name in ("codec", "exact", "ratio", "pack MB/s", "unpack MB/s", "error (RMS)", "KL", "same tokens"):
        table.add_column(name, justify="left" if name == "codec" else "right")
    for name, of in figures.items():
        table.add_row(
            name,
            "yes" if make_codec(name).is_exact else "no",
            f"{median(of['ratio']):.2f}",
            "–" if name == "raw" else f"{median(of['encode MB/s']):,.0f}",
            "–" if name == "raw" else f"{median(of['decode MB/s']):,.0f}",
            f"{median(of['error']):.2%}",
            f"{mean(of['KL']):.4f}",
            f"{mean(of['agreement']):.1%}",
        )
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
