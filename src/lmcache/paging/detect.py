"""Finding the :class:`KVLayout` of the tensors that an engine registers, from shape, strides and backend.

What is found here is a reading of the shapes; :mod:`lmcache.paging.verify` proves it on the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lmcache.paging.layout import KVLayout, Page, Plane

KV_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)


class UnknownLayoutError(ValueError):
    """KV pages that cannot be read with certainty. The message names what was seen and what is known."""


@dataclass(frozen=True)
class PageHints:
    """What the engine says about its pages. ``head_dim`` is latent + rope for MLA, and ``num_kv_heads`` 1.

    ``backend`` is the engine's name of its attention backend (``CPU_ATTN``, ``FLASH_ATTN``, …). ``engine`` (name and
    version) is for messages only.
    """

    block_size: int
    num_kv_heads: int
    head_dim: int
    backend: str = ""
    engine: str = ""

    def __str__(self) -> str:
        return (
            f"block_size={self.block_size}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"backend={self.backend or 'not given'}, engine={self.engine or 'not given'}"
        )


Views: TypeAlias = tuple[torch.Tensor, ...]


def detect_layout(tensors: Mapping[str, torch.Tensor], hints: PageHints) -> KVLayout:
    """The layout of one tensor a layer, as vLLM's ``register_kv_caches`` gets them, in the order of the mapping.

    Raises:
        UnknownLayoutError: no known layout fits, more than one does, or the layers differ.
    """
    first, names = _equal_layers(tensors, hints)
    fits = [(known, views) for known in KNOWN_LAYOUTS if (views := known.read(first, hints)) is not None]
    if len(fits) != 1:
        problem = "No known layout fits" if not fits else "More than one known layout fits"
        known_layouts = "; ".join(known.description for known in KNOWN_LAYOUTS)
        raise UnknownLayoutError(
            f"{problem} the KV pages of layer {names[0]!r}: {_describe(first)}. The engine says {hints}. "
            f"Known are: {known_layouts}; with B blocks of N tokens, H KV heads of D dims."
        )
    known, views = fits[0]
    _check_block_size(views[0].shape[1], first, hints)
    order = "nhd" if views[-1].stride(1) >= views[-1].stride(2) else "hnd"
    return _layout(known.name.format(order=order), len(names), views, tuple(Plane.of(v, first) for v in views), first)


def detect_pool_layout(
    k_pools: Sequence[torch.Tensor], v_pools: Sequence[torch.Tensor] | None, hints: PageHints
) -> KVLayout:
    """The layout of one pool of slots a layer and plane, ``[slots, heads, dim]``, as SGLang keeps them.

    ``v_pools`` is None for MLA. The layout's ``tensors`` are ``[*k_pools, *v_pools]``.

    Raises:
        UnknownLayoutError: as :func:`detect_layout`.
    """
    pools = [list(k_pools)] if v_pools is None else [list(k_pools), list(v_pools)]
    if any(len(pool) != len(pools[0]) for pool in pools):
        raise UnknownLayoutError(f"{len(pools[0])} K pools were registered, but {len(pools[-1])} V pools")
    size = hints.block_size
    views, planes = [], []
    for part, pool in enumerate(pools):
        first, _ = _equal_layers({f"{'KV'[part]} pool {i}": tensor for i, tensor in enumerate(pool)}, hints)
        if first.dim() != 3 or tuple(first.shape[1:]) != (hints.num_kv_heads, hints.head_dim):
            raise UnknownLayoutError(
                f"The {'KV'[part]} pools must be [slots, {hints.num_kv_heads}, {hints.head_dim}], got "
                f"{_describe(first)}. The engine says {hints}. K and V of different head dims are not supported."
            )
        if first.shape[0] % size:
            raise UnknownLayoutError(f"{first.shape[0]} slots are no whole number of pages of {size} tokens")
        views.append(torch.unflatten(first, 0, (-1, size)))
        planes.append(Plane.of(views[-1], first, part))
    if any(view.shape != views[0].shape or view.dtype != views[0].dtype for view in views):
        raise UnknownLayoutError(f"K and V pools differ: {_describe(pools[0][0])} and {_describe(pools[-1][0])}")
    name = "mla-pool" if v_pools is None else "kv-pools"
    return _layout(name, len(pools[0]), tuple(views), tuple(planes), None)


@dataclass(frozen=True)
class KnownLayout:
    """``read(tensor, hints)`` gives the planes ``[B, N, H, D]`` of one layer, or None when this is not it.

    ``{order}`` in ``name`` stands for nhd or hnd: whether the tokens or the heads of a page are outermost in memory.
    """

    name: str
    description: str
    read: Callable[[torch.Tensor, PageHints], Views | None]


def _on_cpu_backend(hints: PageHints) -> bool:
    return "CPU" in hints.backend.upper()


def _read_cpu_vec(tensor: torch.Tensor, hints: PageHints) -> Views | None:
    dim = hints.head_dim
    if not _on_cpu_backend(hints) or tensor.dim() != 4 or tensor.shape[1] != hints.num_kv_heads:
        return None
    if tensor.shape[3] != 2 * dim or not tensor[0].is_contiguous():
        return None
    blocks, heads, size, _ = tensor.shape
    k, v = tensor.view(blocks, heads, 2, size * dim).unbind(2)
    return k.view(blocks, heads, dim, size).permute(0, 3, 1, 2), v.view(blocks, heads, size, dim).permute(0, 2, 1, 3)


def _read_kv_last(tensor: torch.Tensor, hints: PageHints) -> Views | None:
    if _on_cpu_backend(hints) or not hints.backend or tensor.dim() != 4:
        return None
    if (tensor.shape[1], tensor.shape[3]) != (hints.num_kv_heads, 2 * hints.head_dim):
        return None
    both = tensor.transpose(1, 2)
    return both[..., : hints.head_dim], both[..., hints.head_dim :]


def _read_kv_second(tensor: torch.Tensor, hints: PageHints) -> Views | None:
    if _on_cpu_backend(hints) or tensor.dim() != 5 or tensor.shape[1] != 2:
        return None
    if tuple(tensor.shape[3:]) != (hints.num_kv_heads, hints.head_dim):
        return None
    return tensor.unbind(1)


def _read_kv_first(tensor: torch.Tensor, hints: PageHints) -> Views | None:
    if _on_cpu_backend(hints) or tensor.dim() != 5 or tensor.shape[0] != 2:
        return None
    if tuple(tensor.shape[3:]) != (hints.num_kv_heads, hints.head_dim):
        return None
    return tensor.unbind(0)


def _read_mla(tensor: torch.Tensor, hints: PageHints) -> Views | None:
    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(1)
    if tensor.dim() != 4 or hints.num_kv_heads != 1 or (tensor.shape[1], tensor.shape[3]) != (1, hints.head_dim):
        return None
    return (tensor.transpose(1, 2),)


def _read_plain(tensor: torch.Tensor, hints: PageHints) -> Views | None:
    if tensor.dim() != 4 or tensor.shape[0] != 2 or tuple(tensor.shape[2:]) != (hints.num_kv_heads, hints.head_dim):
        return None
    if tensor.shape[1] % hints.block_size:
        return None
    paged = torch.unflatten(tensor, 1, (-1, hints.block_size))
    return paged[0], paged[1]


KNOWN_LAYOUTS = (
    KnownLayout("vllm-cpu-vec", "[B, H, N, 2D] of a CPU backend, K transposed in the first half", _read_cpu_vec),
    KnownLayout("kv-last-{order}", "[B, H, N, 2D] of a GPU backend, K in [..., :D], by stride", _read_kv_last),
    KnownLayout("kv-second-{order}", "[B, 2, N, H, D], by stride", _read_kv_second),
    KnownLayout("kv-first-{order}", "[2, B, N, H, D], by stride", _read_kv_first),
    KnownLayout("mla", "[B, N, D] or [B, 1, N, D], one latent of D dims a token", _read_mla),
    KnownLayout("plain", "[2, slots, H, D]", _read_plain),
)


def _equal_layers(tensors: Mapping[str, torch.Tensor], hints: PageHints) -> tuple[torch.Tensor, list[str]]:
    """The first layer's tensor, standing for all, and the layers' names."""
    if not tensors:
        raise UnknownLayoutError("The engine registered no KV pages")
    names = list(tensors)
    first = tensors[names[0]]
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UnknownLayoutError(
                f"Layer {name!r} registered a {type(tensor).__name__} instead of one tensor; state of that kind "
                f"(Mamba, linear attention) is not supported. The engine says {hints}."
            )
        if tensor.dtype not in KV_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in KV_DTYPES)
            raise UnknownLayoutError(f"Layer {name!r} has {_describe(tensor)}; known dtypes are {known}")
        if _signature(tensor) != _signature(first):
            raise UnknownLayoutError(
                f"Layers with different KV pages are not supported: {names[0]!r} has {_describe(first)}, "
                f"{name!r} has {_describe(tensor)}. The engine says {hints}."
            )
    if first.numel() == 0:
        raise UnknownLayoutError(f"The KV pages are empty: {_describe(first)}. The engine says {hints}.")
    return first, names


def _signature(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _describe(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"shape {tuple(tensor.shape)}, strides {tensor.stride()}, {dtype} on {tensor.device}"


def _check_block_size(found: int, tensor: torch.Tensor, hints: PageHints) -> None:
    # A kernel may use smaller blocks than the engine's block table; the numbers of slots stay the same.
    if hints.block_size % found:
        raise UnknownLayoutError(
            f"Pages of {found} tokens ({_describe(tensor)}) do not divide the engine's blocks. The engine says {hints}."
        )


def _layout(
    name: str, num_layers: int, views: Views, planes: tuple[Plane, ...], page_tensor: torch.Tensor | None
) -> KVLayout:
    blocks, size, heads, dim = views[0].shape
    return KVLayout(
        name=name,
        dtype=views[0].dtype,
        num_layers=num_layers,
        num_blocks=blocks,
        block_size=size,
        num_heads=heads,
        head_dim=dim,
        planes=planes,
        page=_dense_page(page_tensor, planes) if page_tensor is not None else None,
    )


def _dense_page(tensor: torch.Tensor, planes: tuple[Plane, ...]) -> Page | None:
    """What one step of the first dim holds, if that is a block and one dense run of memory."""
    if any(plane.strides[0] != tensor.stride(0) for plane in planes):
        return None
    numel = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size > 1 and stride != numel:
            return None
        numel *= size
    if tensor.shape[0] > 1 and tensor.stride(0) < numel:
        return None
    return Page(tensor.stride(0), numel)
