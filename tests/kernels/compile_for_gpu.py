"""Compiles kernels for a GPU that is not there, down to its machine code: what no interpreter tells.

    python -m tests.kernels.compile_for_gpu

As for pages of Llama-3.1-8B in bf16 and fp8, and of heads whose size is no power of two. Prints what cannot be
compiled, and ends with 1 if anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_for

from lmcache.kernels.kv_rows import KVLayers, KVRows
from tests.kernels.launching_modules import launching_modules

H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
TOKENS, FRESH = 512, 60


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    constants: dict[str, Any]

    def compile(self) -> None:
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        hints: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, param in enumerate(self.kernel.params):
            arg = self.constants[param.name] if param.is_constexpr else self.args[index]
            if isinstance(arg, torch.Tensor):
                signature[param.name] = TYPES[arg.dtype]
                hints[index,] = [["tt.divisibility", 16]]
            elif param.is_constexpr or arg is None or (arg == 1 and not param.do_not_specialize and type(arg) is int):
                signature[param.name] = "constexpr"
                constants[index,] = arg
            elif isinstance(arg, float):
                signature[param.name] = "fp32"
            else:
                signature[param.name] = "i32" if -(2**31) <= arg < 2**31 else "i64"
                if arg % 16 == 0 and not param.do_not_specialize:
                    hints[index,] = [["tt.divisibility", 16]]
        compile_for(ASTSource(self.kernel, signature, constants, hints), target=H100, options=self.options)

    def __str__(self) -> str:
        kinds = [str(arg.dtype).removeprefix("torch.") for arg in self.args if isinstance(arg, torch.Tensor)]
        return f"{self.kernel.__name__} {' '.join(dict.fromkeys(kinds))} {self.constants} {self.options}"


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def note(
        kernel: Any, _: object, *args: Any, num_warps: int = 4, num_stages: int | None = None, **constants: Any
    ) -> None:
        options = {"num_warps": num_warps} | ({} if num_stages is None else {"num_stages": num_stages})
        launches.append(Launch(kernel, args, options, constants))

    with ExitStack() as patches:
        for module in launching_modules():
            patches.enter_context(patch.object(module, "launch", note))
        yield launches


def pages(heads: int, dim: int, stored: torch.dtype) -> KVRows:
    made = torch.zeros(2, TOKENS, heads, dim, dtype=torch.float32).to(stored)
    rows = KVRows.of_tensors(made[0], made[1])
    if stored.itemsize > 1:
        return rows
    return rows.at(made[0], made[1], torch.ones(1), torch.ones(1))


def use(heads: int, dim: int, stored: torch.dtype, computed: torch.dtype) -> None:
    """Every kernel of a blend once, and attention by each of its ways."""
    from lmcache.kernels.attention_received import attention_received
    from lmcache.kernels.attention_tiles import padded_dim, tiles
    from lmcache.kernels.copy_heads import copy_heads
    from lmcache.kernels.kriging import Pieces, can_krige, krige_weights
    from lmcache.kernels.kriging_shift import changes_of, krige_shift
    from lmcache.kernels.kv_read import deviation, read, read_among
    from lmcache.kernels.kv_write import Turns, place, write
    from lmcache.kernels.next_layer import next_layer
    from lmcache.kernels.sparse_attention import SeenByAll, sparse_attention

    kv, group = pages(heads, dim, stored), 4
    ints, distances = torch.arange(FRESH, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    fresh = torch.zeros(FRESH, heads, dim, dtype=computed)
    q = torch.zeros(FRESH, heads * group, dim, dtype=computed)
    known = torch.ones(TOKENS, dtype=torch.bool).view(torch.uint8)
    for blocks in tiles(padded_dim(dim, dim), computed):
        for part_keys in (TOKENS, TOKENS // 4):
            sparse_attention(q, kv, ints, scale=0.1, part_keys=part_keys, blocks=blocks)
    half = TOKENS // 2
    sparse_attention(q, kv, ints, scale=0.1, part_keys=half, sliding_window=100, softcap=20.0)
    sparse_attention(q, kv, ints, scale=0.1, part_keys=half, known=known, sinks=torch.zeros(heads * group))
    if kv.key_scale is None:
        seen = SeenByAll(32, ints, torch.zeros_like(q), torch.zeros(q.shape, dtype=torch.float32))
        sparse_attention(q, kv, ints, scale=0.1, seen_by_all=seen)
    attention_received(q, kv, ints, scale=0.1, softcap=None)
    table = torch.zeros(1, dim // 2)
    staged = torch.zeros(3, 2 * FRESH, heads * dim).to(stored)
    for turns in (Turns(table, table, ints, True), None):
        place(staged[0], ints, ints, ints, kv, turns)
        place(staged, ints, ints, ints, kv, turns, distances)
    write(fresh, fresh, ints, kv)
    write(fresh, fresh, ints, kv, add=True)
    read(kv, ints)
    read_among(kv, ints, fresh, fresh, ints)
    deviation(fresh, fresh, ints, kv)
    next_layer(distances, distances, distances, distances)
    copy_heads((q, fresh, fresh), (torch.empty_like(q), torch.empty_like(fresh), torch.empty_like(fresh)))
    if can_krige(kv, FRESH):
        one = torch.tensor([0], dtype=torch.int32)
        pieces = Pieces(one, one, one, one, ints, known, TOKENS, FRESH)
        for layers, at in ((KVLayers(kv, distances), distances[:1]), (KVLayers(kv, None), None)):
            weights = pieces.room_for_weights(computed, layers.num_layers)
            krige_weights(layers, pieces, weights, passage=1.0, local=1.0, width=9.0, alike=1.0, reach=1.0, noise=1.0)
            krige_shift(kv, pieces, weights, changes_of(kv, ints, fresh, fresh), at)


CASES = (
    (8, 128, torch.bfloat16, torch.bfloat16),
    (8, 128, torch.float8_e4m3fn, torch.bfloat16),
    (3, 48, torch.float8_e5m2, torch.float16),
)


def main() -> None:
    with _recorded() as launches:
        for case in CASES:
            use(*case)
    failed, done = 0, set[str]()
    for launch in launches:
        if (name := str(launch)) in done:
            continue
        done.add(name)
        try:
            launch.compile()
        except Exception as problem:
            failed += 1
            print(f"{name}: {str(problem)[-600:]}", flush=True)
    print(f"{len(done) - failed} of {len(done)} variants compiled")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
