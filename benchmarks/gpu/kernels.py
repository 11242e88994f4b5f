"""Checks the kernels of CacheBlend on a GPU against float64, and measures those that move and correct KV.

    PYTHONPATH=src python benchmarks/gpu/kernels.py [--out DIR]

The shape is Llama-3.1-8B's: 32 query heads, 8 KV heads of 128, bfloat16, pages of 16 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from lmcache.blend.attention import QueryMask
from lmcache.blend.attention import attention_received as received_reference
from lmcache.blend.attention import sparse_attention as attention_reference
from lmcache.blend.correctors.interface import RowCorrection
from lmcache.blend.correctors.kriging import KrigingCorrector
from lmcache.blend.fp8_pages import FP8_DTYPES
from lmcache.kernels.attention_received import attention_received
from lmcache.kernels.kv_read import deviation, read
from lmcache.kernels.kv_rows import KVRows
from lmcache.kernels.kv_write import Turns, place, write
from lmcache.kernels.sparse_attention import sparse_attention

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16


def median_ms(call: Callable[[], Any]) -> float:
    return float(do_bench(call, warmup=20, rep=100, return_mode="median"))


def pages(num_tokens: int, dtype: torch.dtype, kv_heads: int = KV_HEADS, dim: int = DIM) -> KVRows:
    """Random KV in shuffled pages ``[blocks, 2, block, heads, dim]``."""
    blocks = num_tokens // BLOCK + 9
    kv = torch.randn(blocks, 2, BLOCK, kv_heads, dim, device="cuda").to(dtype)
    table = torch.randperm(blocks, device="cuda")
    token = torch.arange(num_tokens, device="cuda")
    offsets = table[token // BLOCK] * kv.stride(0) + token % BLOCK * kv.stride(2)
    rows = KVRows(kv[:, 0], kv[:, 1], offsets, kv_heads, dim, dim, kv.stride(3), kv.stride(3), 16)
    if dtype.itemsize > 1:
        return rows
    scales = torch.tensor([[0.3], [1.7]], device="cuda").repeat(1, 4)
    return rows.at(rows.keys, rows.values, scales[0, :1], scales[1, :1])


def dense(kv: KVRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Real numbers."""
    index = kv.offsets[:, None, None] + torch.arange(kv.num_heads, device="cuda")[:, None] * kv.key_head_stride
    index = index + torch.arange(kv.dim, device="cuda")
    flat = [
        plane.as_strided((plane.untyped_storage().size() // plane.itemsize - plane.storage_offset(),), (1,))
        for plane in (kv.keys, kv.values)
    ]
    if kv.key_scale is None or kv.value_scale is None:
        return flat[0][index], flat[1][index]
    k, v = (plane.view(torch.uint8)[index].view(plane.dtype).float() for plane in flat)
    return k * kv.key_scale, v * kv.value_scale


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (ours.double().cpu() - exact.cpu()).norm() / exact.cpu().norm()
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def check_attention() -> list[str]:
    bad = []
    same = [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    cases = itertools.product(
        [*same, *((torch.bfloat16, dtype) for dtype in FP8_DTYPES)],
        [
            (777, 0.15, 32, 8, 128, None, None, False, False, None),
            (777, 0.02, 32, 8, 128, None, None, False, False, 256),
            (500, 0.3, 14, 2, 64, None, None, False, False, None),
            (500, 0.3, 6, 3, 96, 100, None, True, True, None),
            (300, 0.3, 8, 4, 256, None, 30.0, True, False, 192),
        ],
    )
    for (dtype, kept), (keys, share, heads, kv_heads, dim, window, softcap, with_sinks, some, part_keys) in cases:
        kv = pages(keys, kept, kv_heads, dim)
        positions = torch.randperm(keys)[: max(3, int(keys * share))].sort().values
        q = torch.randn(len(positions), heads, dim, device="cuda").to(dtype)
        known = None
        if some:
            known = torch.rand(keys) < 0.7
            known[positions] = True
        sinks = torch.randn(heads, device="cuda") if with_sinks else None
        scoring: dict[str, Any] = {"scale": dim**-0.5, "softcap": softcap}
        k, v = dense(kv)
        mask = QueryMask(positions, window, known)
        exact = attention_reference(
            q.double().cpu(),
            k.double().cpu(),
            v.double().cpu(),
            mask,
            sinks=None if sinks is None else sinks.cpu(),
            **scoring,
        )
        on_device = QueryMask(positions.cuda(), window, None if known is None else known.cuda())
        in_torch = attention_reference(q, k.to(dtype), v.to(dtype), on_device, sinks=sinks, **scoring)
        theirs = error(in_torch, exact)
        ours, _ = sparse_attention(
            q,
            kv,
            positions.cuda().int(),
            sliding_window=window,
            sinks=sinks,
            known=None if known is None else known.cuda(),
            part_keys=part_keys,
            **scoring,
        )
        got = error(ours, exact)
        line = f"attention {dtype} of {kept} {keys} {heads}/{kv_heads}x{dim} window {window} cap {softcap} "
        line += f"parts of {part_keys}: "
        print(line + f"error {got:.2e}, torch {theirs:.2e}", flush=True)
        if not got <= 1.5 * theirs + 1e-7:
            bad.append(line)
        asking = q[-5:]
        by_key = attention_received(
            asking,
            kv,
            positions[-5:].cuda().int(),
            sliding_window=window,
            sinks=sinks,
            known=None if known is None else known.cuda(),
            **scoring,
        )
        mask = QueryMask(positions[-5:], window, known)
        exact = received_reference(
            asking.double().cpu(), k.double().cpu(), mask, sinks=None if sinks is None else sinks.cpu(), **scoring
        )
        got = error(by_key, exact.double())
        if not got <= 5e-3:
            bad.append(f"received {got:.2e}, {line}")
    return bad


def check_rows() -> list[str]:
    bad = []
    for dtype, (heads, dim, half, neox) in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), [(8, 128, 64, True), (3, 96, 32, True), (2, 80, 20, False)]
    ):
        kv = pages(333, dtype, heads, dim)
        kv.keys.fill_(float("nan")), kv.values.fill_(float("nan"))
        staged = torch.randn(700, heads * dim, device="cuda").to(dtype)
        k_from, v_from = (torch.randperm(700, device="cuda")[:301].int() for _ in range(2))
        rows = torch.randperm(333, device="cuda")[:301].int()
        angles = torch.randn(301, half, device="cuda", dtype=torch.float64) * 50
        turns = Turns(angles.cos().float(), angles.sin().float(), torch.arange(301, device="cuda").int(), neox)
        place(staged, k_from, v_from, rows, kv, turns)
        keys, values = read(kv, rows)
        x = staged[k_from].view(-1, heads, dim).double()
        turned = x.clone()
        first, second = (
            (slice(0, half), slice(half, 2 * half)) if neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        )
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., second] * cos + x[..., first] * sin
        off = (keys.double() - turned).abs() / (turned.abs() + x.norm(dim=-1, keepdim=True) * 1e-2)
        worst, allowed = float(off.nan_to_num(nan=9).max()), {2: torch.finfo(dtype).eps, 4: 1e-5}[dtype.itemsize]
        same = torch.equal(values, staged[v_from].view(-1, heads, dim))
        untouched = int(torch.isfinite(kv.keys).sum()) == 301 * heads * dim
        fresh = torch.randn(301, heads + 2, 2 * dim, device="cuda").to(dtype)[:, 1 : heads + 1, :dim]
        measured = deviation(fresh, fresh, rows, kv)
        exact = torch.stack([(fresh.double() - held.double()).square().flatten(1).sum(1) for held in (keys, values)])
        near = torch.allclose(measured.double(), exact, rtol=1e-4)
        write(fresh, fresh, rows, kv)
        written = all(torch.equal(plane, fresh) for plane in read(kv, rows))
        write(fresh.float(), fresh.float(), rows, kv, add=True)
        added = all(torch.equal(plane, 2 * fresh) for plane in read(kv, rows))
        ok = worst <= allowed and same and untouched and near and written and added
        line = f"rows {dtype} {heads}x{dim} neox {neox}: turned {worst:.1e} {same} {untouched} {near} {written} {added}"
        print(line, flush=True)
        if not ok:
            bad.append(line)
    return bad


def copy_rates() -> dict[str, float]:
    kv = pages(32768, torch.bfloat16)
    rows = torch.arange(32768, device="cuda").int()
    staged = torch.randn(2 * 32768, KV_HEADS * DIM, device="cuda").bfloat16()
    k_from, v_from = torch.arange(32768, device="cuda").int(), torch.arange(32768, 65536, device="cuda").int()
    angles = torch.randn(32, 64, device="cuda")
    turns = Turns(angles.cos(), angles.sin(), (rows // 1024).int(), True)
    other = torch.empty_like(staged)
    moved = 2 * staged.nbytes
    fresh = staged.view(2, 32768, KV_HEADS, DIM)
    shift = torch.randn(2, 32768, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    rates = {
        "device copy": moved / median_ms(partial(other.copy_, staged)),
        "place, turned": moved / median_ms(partial(place, staged, k_from, v_from, rows, kv, turns)),
        "place": moved / median_ms(partial(place, staged, k_from, v_from, rows, kv, None)),
        "read": moved / median_ms(partial(read, kv, rows)),
        "write": moved / median_ms(partial(write, fresh[0], fresh[1], rows, kv)),
        "add": 1.5 * moved / median_ms(partial(write, shift[0], shift[1], rows, kv, add=True)),
        "deviation": moved / median_ms(partial(deviation, fresh[0], fresh[1], rows, kv)),
    }
    kv, turned = pages(32768, torch.float8_e4m3fn), staged.to(torch.float8_e4m3fn)
    few = 2 * turned.nbytes
    rates["place fp8, turned"] = few / median_ms(partial(place, turned, k_from, v_from, rows, kv, turns))
    rates["write fp8"] = 0.75 * moved / median_ms(partial(write, fresh[0], fresh[1], rows, kv))
    rates["add fp8"] = 1.0 * moved / median_ms(partial(write, shift[0], shift[1], rows, kv, add=True))
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.2f} TB/s, {rate / rates['device copy']:.0%} of a copy", flush=True)
    return rates


class _Rows:
    def __init__(self, kv: KVRows) -> None:
        self.kv = kv

    @property
    def kernel_rows(self) -> KVRows:
        return self.kv

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return read(self.kv, rows)

    def add(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        write(keys, values, rows, self.kv, add=True)


def other_times() -> dict[str, float]:
    times = {}
    for count in (4, 8, 31):
        kv = pages(count * 1024, torch.bfloat16)
        for share in (0.05, 0.15):
            rows = torch.randperm(count * 1024)[: int(count * 1024 * share)].sort().values
            fresh = torch.randn(2, len(rows), KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
            spans = tuple((at * 1024, at * 1024 + 1024) for at in range(count))
            layer = RowCorrection(0, _Rows(kv), rows, fresh[0], fresh[1], spans, {})
            corrector = KrigingCorrector()
            times[f"kriging {count}x1024 {share:.0%}"] = median_ms(partial(corrector.correct_rows, layer))
        q = torch.randn(8, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        at = torch.arange(count * 1024 - 8, count * 1024, device="cuda").int()
        times[f"received {count}x1024"] = median_ms(partial(attention_received, q, kv, at, scale=DIM**-0.5))
        q = torch.randn(80, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        at = torch.cat([torch.arange(48), torch.arange(count * 1024 - 32, count * 1024)]).cuda().int()
        times[f"question {count}x1024"] = median_ms(partial(sparse_attention, q, kv, at, scale=DIM**-0.5))
        kv = pages(count * 1024, torch.float8_e4m3fn)
        times[f"question fp8 {count}x1024"] = median_ms(partial(sparse_attention, q, kv, at, scale=DIM**-0.5))
    for name, ms in times.items():
        print(f"{name}: {ms:.3f} ms", flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    args = parser.parse_args()
    torch.manual_seed(0)
    bad = check_rows() + check_attention()
    found = {"copies": copy_rates(), "times": other_times(), "bad": bad}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kernels.json").write_text(json.dumps(found, indent=1))
    print("ALL RIGHT" if not bad else f"WRONG: {bad}")


if __name__ == "__main__":
    main()
