"""TFLOP/s of attention of scattered queries over pages, beside FlashAttention 3 with as many rows of queries.

    python -m benchmarks.gpu.attention [--out DIR] [--tune]

The shape is Llama-3.1-8B's: 32 query heads, 8 KV heads of 128, bfloat16, pages of 16 tokens. ``ours`` is our kernel by
itself; ``ours with FlashAttention``: what a blend in vLLM runs, FlashAttention for the part that needs no mask, and our
kernel for the rest. ``FlashAttention 3`` is vLLM's own, causal, the queries being the prompt's last tokens as in a
chunked prefill: over the same pages, and over keys that lie side by side. Pairs of query and key that the mask allows
count, 4 · heads · dim operations each. Without vLLM only ours is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.testing import do_bench

from lmcache.bench.machine import describe_machine
from lmcache.blend.dense_runs import DenseAttention, dense_runs, pays, run_tokens
from lmcache.kernels.kv_rows import KVRows
from lmcache.kernels.sparse_attention import SeenByAll, sparse_attention

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
SCALE = DIM**-0.5
OURS, JOINED, PAGED, DENSE = "ours", "ours with FlashAttention", "FlashAttention 3, pages", "FlashAttention 3, dense"


def engines_attention() -> DenseAttention | None:
    try:
        from lmcache.integration.vllm.blend.flash_attention import flash_attention
    except ImportError:
        return None
    impl = SimpleNamespace(vllm_flash_attn_version=3)
    return flash_attention(SimpleNamespace(impl=impl, num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=DIM))


class Case:
    """``share`` of ``keys`` tokens in shuffled pages, as queries."""

    def __init__(self, keys: int, share: float) -> None:
        self.keys = keys
        self.pages = torch.randn(keys // BLOCK + 9, 2, BLOCK, KV_HEADS, DIM, device="cuda").bfloat16()
        self.blocks = torch.randperm(len(self.pages))[: keys // BLOCK]
        self.slots = (self.blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        self.positions = torch.randperm(keys)[: int(keys * share)].sort().values
        self.q = torch.randn(len(self.positions), HEADS, DIM, device="cuda").bfloat16()
        stride = self.pages.stride()
        offsets = (self.slots // BLOCK * stride[0] + self.slots % BLOCK * stride[2]).cuda()
        self.rows = KVRows(self.pages[:, 0], self.pages[:, 1], offsets, KV_HEADS, DIM, DIM, stride[3], stride[3], BLOCK)
        self.on_device = self.positions.cuda().int()

    @property
    def scattered_pairs(self) -> float:
        return float((self.positions + 1).double().sum())

    @property
    def last_pairs(self) -> float:
        """With the same number of queries at the prompt's end."""
        count = len(self.positions)
        return count * (self.keys - count) + count * (count + 1) / 2

    def ours(self, blocks: Any = None) -> torch.Tensor:
        return sparse_attention(self.q, self.rows, self.on_device, scale=SCALE, blocks=blocks)[0]

    def joined(self, dense: DenseAttention) -> Callable[[], torch.Tensor] | None:
        if not pays(len(self.positions), self.keys):
            return None
        runs = dense_runs(
            self.positions, self.blocks.to(self.q.device, torch.int32), self.q.device, run_tokens(HEADS // KV_HEADS)
        )

        def attend() -> torch.Tensor:
            out, lse = dense(self.q, self.pages[:, 0], self.pages[:, 1], runs, SCALE)
            seen = SeenByAll(runs.tokens, runs.keys, out, lse)
            return sparse_attention(self.q, self.rows, self.on_device, scale=SCALE, seen_by_all=seen)[0]

        return attend

    def flash(self, *, paged: bool) -> Callable[[], torch.Tensor]:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        ends = {
            "max_seqlen_q": len(self.q),
            "cu_seqlens_q": torch.tensor([0, len(self.q)], device="cuda", dtype=torch.int32),
            "max_seqlen_k": self.keys,
        }
        if paged:
            keys, values = self.pages[:, 0], self.pages[:, 1]
            ends["seqused_k"] = torch.tensor([self.keys], device="cuda", dtype=torch.int32)
            ends["block_table"] = self.blocks.cuda().int()[None]
        else:
            keys, values = torch.randn(2, self.keys, KV_HEADS, DIM, device="cuda").bfloat16()
            ends["cu_seqlens_k"] = torch.tensor([0, self.keys], device="cuda", dtype=torch.int32)
        return partial(
            flash_attn_varlen_func, q=self.q, k=keys, v=values, softmax_scale=SCALE, causal=True, fa_version=3, **ends
        )


def rate(call: Callable[[], Any], pairs: float) -> float:
    """TFLOP/s"""
    milliseconds = do_bench(call, warmup=20, rep=100, return_mode="median")
    return 4 * pairs * HEADS * DIM / float(milliseconds) / 1e9


def rates(keys: int, share: float, dense: DenseAttention | None) -> dict[str, float]:
    case = Case(keys, share)
    found = {OURS: rate(case.ours, case.scattered_pairs)}
    if dense is not None:
        joined = case.joined(dense)
        if joined is not None:
            found[JOINED] = rate(joined, case.scattered_pairs)
        found[PAGED] = rate(case.flash(paged=True), case.last_pairs)
        found[DENSE] = rate(case.flash(paged=False), case.last_pairs)
    return found


def tiles(keys: int, share: float) -> dict[str, float]:
    """Our kernel's rate by the size of its tiles."""
    case, found = Case(keys, share), dict[str, float]()
    for blocks in itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4)):
        try:
            found[str(blocks)] = rate(partial(case.ours, blocks), case.scattered_pairs)
        except Exception as problem:  # noqa: PERF203 - tiles that do not fit
            print("   ", blocks, repr(problem)[:90])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--tune", action="store_true", help="try many sizes of tiles")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense, cells = engines_attention(), list[dict[str, Any]]()
    for keys, share in itertools.product((4096, 8192, 16384, 32768), (0.05, 0.15)):
        each = rates(keys, share, dense)
        cells.append({"tokens": keys, "share": share, "tflops": each})
        told = ", ".join(f"{name} {speed:.0f}" for name, speed in each.items())
        print(f"{keys} tokens, {share:.0%}: TFLOP/s: {told}", flush=True)
        if args.tune:
            best = sorted(tiles(keys, share).items(), key=lambda item: -item[1])[:4]
            print(f"    best tiles: {[(name, round(speed)) for name, speed in best]}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {
        "benchmark": "attention",
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {describe_machine()}",
        "settings": {"tiny": False},
        "cells": cells,
    }
    (args.out / "attention.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
