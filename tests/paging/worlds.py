"""Small engines: page tensors of every layout, and where a token lies in them, written down a second time.

``token(…)`` here finds one token by plain indexing. It knows nothing of strides, views or ``KVLayout``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.paging.detect import PageHints, detect_layout, detect_pool_layout
from lmcache.paging.layout import KVLayout

Tensors = list[torch.Tensor]
TokenAt = Callable[[torch.Tensor, int, int, int], torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    layers: int = 3
    blocks: int = 6
    block_size: int = 4
    heads: int = 2
    dim: int = 8
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def num_slots(self) -> int:
        return self.blocks * self.block_size


@dataclass(frozen=True)
class World:
    """An engine's pages. ``memory`` is all that may be written, for comparing every byte."""

    sizes: Sizes
    tensors: Tensors
    memory: Tensors
    layout: KVLayout
    num_planes: int
    token_at: Callable[[Tensors, int, int, int], torch.Tensor]

    def token(self, layer: int, plane: int, slot: int) -> torch.Tensor:
        """``[heads, dim]``, writable."""
        return self.token_at(self.tensors, layer, plane, slot)

    def bytes(self) -> torch.Tensor:
        return torch.cat([tensor.view(torch.uint8).flatten() for tensor in self.memory])


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern, NaNs of every payload among them."""
    *outer, last = shape
    return torch.randint(0, 256, (*outer, last * dtype.itemsize), dtype=torch.uint8).view(dtype)


def new_chunk(spec: KVSpec) -> MemoryObj:
    """A chunk that holds random bytes, pinned where there is a GPU."""
    size = -(-spec.nbytes // 4096) * 4096
    memory = torch.randint(0, 256, (size,), dtype=torch.uint8)
    return MemoryObj(spec, memory.pin_memory() if torch.cuda.is_available() else memory, 0, lambda obj: None)


def _vllm(
    physical: tuple[int, ...],
    to_logical: Callable[[torch.Tensor], list[torch.Tensor]],
    token: TokenAt,
    sizes: Sizes,
    backend: str = "FLASH_ATTN",
    num_planes: int = 2,
    heads: int | None = None,
) -> World:
    """``physical`` is the shape of all memory in order; ``to_logical`` gives the layers' tensors as registered."""
    memory = random_bytes(physical, sizes.dtype).to(sizes.device)
    tensors = to_logical(memory)
    hints = PageHints(sizes.block_size, heads or sizes.heads, sizes.dim, backend=backend, engine="test")
    layout = detect_layout({f"layers.{i}": tensor for i, tensor in enumerate(tensors)}, hints)
    size = sizes.block_size

    def token_at(tensors: Tensors, layer: int, plane: int, slot: int) -> torch.Tensor:
        return token(tensors[layer], plane, slot // size, slot % size)

    return World(sizes, tensors, [memory], layout, num_planes, token_at)


def cpu_vec(s: Sizes) -> World:
    def token(t: torch.Tensor, plane: int, block: int, offset: int) -> torch.Tensor:
        halves = t[block].view(s.heads, 2, s.block_size * s.dim)
        if plane == 0:
            return halves[:, 0].view(s.heads, s.dim, s.block_size)[:, :, offset]
        return halves[:, 1].view(s.heads, s.block_size, s.dim)[:, offset]

    shape = (s.layers, s.blocks, s.heads, s.block_size, 2 * s.dim)
    return _vllm(shape, lambda m: list(m), token, s, backend="CPU_ATTN")


def _kv_second(t: torch.Tensor, plane: int, block: int, offset: int) -> torch.Tensor:
    return t[block, plane, offset]


def kv_second_nhd(s: Sizes) -> World:
    shape = (s.layers, s.blocks, 2, s.block_size, s.heads, s.dim)
    return _vllm(shape, lambda m: list(m), _kv_second, s)


def kv_second_hnd(s: Sizes) -> World:
    shape = (s.layers, s.blocks, 2, s.heads, s.block_size, s.dim)
    return _vllm(shape, lambda m: [t.transpose(2, 3) for t in m], _kv_second, s)


def kv_first(s: Sizes) -> World:
    shape = (s.layers, 2, s.blocks, s.block_size, s.heads, s.dim)
    return _vllm(shape, lambda m: list(m), lambda t, plane, block, offset: t[plane, block, offset], s)


def _kv_last(s: Sizes) -> TokenAt:
    return lambda t, plane, block, offset: t[block, :, offset, plane * s.dim : (plane + 1) * s.dim]


def kv_last_nhd(s: Sizes) -> World:
    shape = (s.layers, s.blocks, s.block_size, s.heads, 2 * s.dim)
    return _vllm(shape, lambda m: [t.transpose(1, 2) for t in m], _kv_last(s), s)


def kv_last_hnd(s: Sizes) -> World:
    return _vllm((s.layers, s.blocks, s.heads, s.block_size, 2 * s.dim), lambda m: list(m), _kv_last(s), s)


def kv_last_blocks_outermost(s: Sizes) -> World:
    shape = (s.blocks, s.layers, s.heads, s.block_size, 2 * s.dim)
    return _vllm(shape, lambda m: list(m.unbind(1)), _kv_last(s), s)


def kv_last_heads_outermost(s: Sizes) -> World:
    shape = (s.layers, s.heads, s.blocks, s.block_size, 2 * s.dim)
    return _vllm(shape, lambda m: [t.transpose(0, 1) for t in m], _kv_last(s), s)


def mla_3d(s: Sizes) -> World:
    shape = (s.layers, s.blocks, s.block_size, s.dim)
    return _vllm(
        shape, lambda m: list(m), lambda t, _, block, offset: t[block, offset].view(1, s.dim), s, "MLA", 1, heads=1
    )


def mla_4d(s: Sizes) -> World:
    shape = (s.layers, s.blocks, 1, s.block_size, s.dim)
    return _vllm(shape, lambda m: list(m), lambda t, _, block, offset: t[block, :, offset], s, "MLA", 1, heads=1)


def plain(s: Sizes) -> World:
    shape = (s.layers, 2, s.num_slots, s.heads, s.dim)
    return _vllm(
        shape, lambda m: list(m), lambda t, plane, block, offset: t[plane, block * s.block_size + offset], s, backend=""
    )


def _pools(s: Sizes, planes: int, heads: int) -> World:
    memory = [random_bytes((s.num_slots, heads, s.dim), s.dtype).to(s.device) for _ in range(planes * s.layers)]
    hints = PageHints(s.block_size, heads, s.dim, engine="test")
    v_pools = memory[s.layers :] if planes == 2 else None
    layout = detect_pool_layout(memory[: s.layers], v_pools, hints)
    return World(
        s, memory, memory, layout, planes, lambda tensors, layer, plane, slot: tensors[plane * s.layers + layer][slot]
    )


def kv_pools(s: Sizes) -> World:
    return _pools(s, 2, s.heads)


def mla_pool(s: Sizes) -> World:
    return _pools(s, 1, 1)


WORLDS: dict[str, Callable[[Sizes], World]] = {
    world.__name__: world
    for world in (
        cpu_vec,
        kv_second_nhd,
        kv_second_hnd,
        kv_first,
        kv_last_nhd,
        kv_last_hnd,
        kv_last_blocks_outermost,
        kv_last_heads_outermost,
        mla_3d,
        mla_4d,
        plain,
        kv_pools,
        mla_pool,
    )
}
WHOLE_PAGES = sorted(WORLDS.keys() - {"kv_first", "kv_last_heads_outermost", "plain", "kv_pools", "mla_pool"})
"""Worlds in which a block is one dense run of memory."""

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2]
