"""``KVLayout``: where a token's K and V lie in an engine's page tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from blake3 import blake3


@dataclass(frozen=True)
class Plane:
    """K or V of one layer as a strided view ``[num_blocks, block_size, heads, dim]`` of a registered tensor.

    ``offset`` and ``strides`` count elements; ``offset`` starts at the tensor's own first element. ``part`` is 0, or 1
    for the V of an engine that keeps K and V in separate tensors.
    """

    offset: int
    strides: tuple[int, int, int, int]
    part: int = 0

    @classmethod
    def of(cls, view: torch.Tensor, tensor: torch.Tensor, part: int = 0) -> Plane:
        """The plane that ``view``, a 4-D view of ``tensor``, shows."""
        block, token, head, dim = view.stride()
        return cls(int(view.storage_offset() - tensor.storage_offset()), (block, token, head, dim), part)


@dataclass(frozen=True)
class Page:
    """A block of one layer as one dense run: ``numel`` elements, ``stride`` elements from one block to the next."""

    stride: int
    numel: int


@dataclass(frozen=True)
class KVLayout:
    """How the KV of ``num_layers`` equal layers lies in the tensors that an engine registered.

    The tensors themselves are passed along as one list, ``tensors``: one a layer, or, where K and V have a tensor
    each, the K of all layers followed by the V of all layers.

    ``planes`` is ``(k, v)``, or ``(latent,)`` for MLA, or ``()`` when the engine packs the tokens of a page in a way of
    its own (AMX tiles): then only whole pages can be moved, and ``packing`` tells one way of packing from another.
    ``page`` is None when the K and V of a block are not one dense run of memory.
    """

    name: str
    dtype: torch.dtype
    num_layers: int
    num_blocks: int
    block_size: int
    num_heads: int
    head_dim: int
    planes: tuple[Plane, ...]
    page: Page | None
    packing: str = ""

    def __post_init__(self) -> None:
        if not self.planes and not (self.page and self.packing):
            raise ValueError(f"layout {self.name!r}: without planes it needs whole pages and the name of their packing")

    @property
    def packed(self) -> bool:
        """Whether single tokens cannot be found inside a page."""
        return not self.planes

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @cached_property
    def page_tag(self) -> str:
        """Name and version of the host layout that keeps whole pages: equal tags mean equally arranged bytes."""
        inside = [(plane.offset, *plane.strides[1:]) for plane in self.planes]
        arrangement = self.packing or blake3(repr(inside).encode()).hexdigest()[:16]
        return f"pages-1:{self.name}:{self.block_size}x{self.num_heads}x{self.head_dim}:{arrangement}"

    def token_offsets(self, slots: torch.Tensor, plane: Plane) -> torch.Tensor:
        """Where in ``plane`` the tokens with ``slots`` (int64 ``[N]``) lie, in elements: int64 ``[N]``.

        What is said of negative slots means nothing.
        """
        block, token, _, _ = plane.strides
        within = slots * token
        between = block - self.block_size * token  # what lies between the last token of a block and the next block
        if not between or self.num_blocks == 1:
            return within
        # A shift takes a tenth of the time of a division.
        shift = self.block_size.bit_length() - 1
        blocks = slots >> shift if self.block_size == 1 << shift else slots // self.block_size
        return within.add_(blocks, alpha=between)

    def plane_views(self, tensors: Sequence[torch.Tensor], layer: int) -> tuple[torch.Tensor, ...]:
        """Each plane of ``layer``, ``[num_blocks, block_size, heads, dim]``, writable."""
        shape = (self.num_blocks, self.block_size, self.num_heads, self.head_dim)
        views = []
        for plane in self.planes:
            tensor = tensors[plane.part * self.num_layers + layer]
            views.append(tensor.as_strided(shape, plane.strides, tensor.storage_offset() + plane.offset))
        return tuple(views)

    def page_view(self, tensors: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
        """The pages of ``layer`` in the order of their memory, ``[num_blocks, page.numel]``, writable.

        Raises:
            ValueError: a block of this layout is not one dense run.
        """
        if self.page is None:
            raise ValueError(f"layout {self.name!r}: the K and V of a block are not one dense run of memory")
        return tensors[layer].as_strided((self.num_blocks, self.page.numel), (self.page.stride, 1))

    def chunk_plane_views(self, chunk: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each plane of whole pages held elsewhere: ``[layers, pages, page.numel]`` seen as
        ``[layers, pages, block_size, heads, dim]``, writable.

        Raises:
            ValueError: the pages are packed, so that there is nothing to see.
        """
        if self.packed:
            raise ValueError(f"layout {self.name!r} packs its pages: single tokens cannot be read from them")
        layers, pages, _ = chunk.shape
        shape = (layers, pages, self.block_size, self.num_heads, self.head_dim)
        return tuple(
            chunk.as_strided(
                shape, (chunk.stride(0), chunk.stride(1), *plane.strides[1:]), chunk.storage_offset() + plane.offset
            )
            for plane in self.planes
        )
