"""Proving a :class:`KVLayout`: write through the engine's own writer, read through our views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from blake3 import blake3

from lmcache.paging.detect import UnknownLayoutError
from lmcache.paging.elements import same_size_word
from lmcache.paging.layout import KVLayout

# Numbers that fp8 e4m3 and e5m2 hold exactly, so that equal bytes mean equal numbers after a quantising writer.
_FP8_EXACT = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Writer(Protocol):
    def __call__(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Put tokens into the pages of ``layer`` as the engine does in a forward pass.

        Args:
            k: ``[T, heads, dim]``, contiguous, on the device of the pages.
            v: like ``k``; for MLA the very same tensor.
            slots: int64 ``[T]``, none negative.
        """


def verify_layout(
    kv_layout: KVLayout, tensors: Sequence[torch.Tensor], writer: Writer, *, dtype: torch.dtype | None = None
) -> KVLayout:
    """Prove on the first, the middle and the last layer that ``kv_layout`` is right, before the pages hold anything.

    Random tokens go to most slots of two blocks. Our views must show them in their places, and the other slots as they
    were. What the two blocks held is put back.

    If the views do not show them, but a block's tokens fill exactly its own page (pages on the CPU), the
    engine packs its pages: the layout that comes back has ``packed`` set and moves pages whole.

    Args:
        dtype: of the ``k`` and ``v`` that the writer takes. Default: that of the pages, or bfloat16 for fp8 pages.

    Returns:
        the layout that was proved, ``kv_layout`` itself or its packed form.

    Raises:
        UnknownLayoutError: the tokens are not where the layout says, and not in whole pages either.
    """
    proof = _Proof(kv_layout, tensors, writer, dtype)
    layers = sorted({0, kv_layout.num_layers // 2, kv_layout.num_layers - 1})
    if kv_layout.packed:
        return proof.packed_form(layers)
    wrong = [fault for layer in layers if (fault := proof.fault_of_planes(layer)) is not None]
    if not wrong:
        return kv_layout
    on_cpu = tensors[0].device.type == "cpu"
    if on_cpu and kv_layout.page is not None and len(kv_layout.planes) == 2:
        return proof.packed_form(layers, because=wrong[0])
    raise UnknownLayoutError(wrong[0])


class _Proof:
    def __init__(
        self, kv_layout: KVLayout, tensors: Sequence[torch.Tensor], writer: Writer, dtype: torch.dtype | None
    ) -> None:
        self._layout = kv_layout
        self._tensors = tensors
        self._writer = writer
        self._device = tensors[0].device
        self._exact = kv_layout.dtype.itemsize > 1
        self._dtype = dtype or (kv_layout.dtype if self._exact else torch.bfloat16)
        self._random = torch.Generator().manual_seed(0)
        # Engines like to keep block 0 for padding.
        self._blocks = sorted({kv_layout.num_blocks // 2, kv_layout.num_blocks - 1})

    def fault_of_planes(self, layer: int) -> str | None:
        """What is wrong with our view of ``layer``; None when it is right."""
        at = self._layout
        word = same_size_word(at.dtype)
        planes = [plane.view(word)[self._blocks] for plane in at.plane_views(self._tensors, layer)]  # copies
        slots = self._slots(torch.tensor(self._blocks))
        order = torch.randperm(len(slots), generator=self._random)
        chosen, others = order[: -(-len(slots) * 3 // 4)], order[-(-len(slots) * 3 // 4) :]
        k = self._pattern(len(chosen))
        v = self._pattern(len(chosen)) if len(at.planes) == 2 else k
        with self._kept(planes, layer):
            self._writer(layer, k, v, slots[chosen].to(self._device))
            after = [plane.view(word)[self._blocks].flatten(0, 1) for plane in at.plane_views(self._tensors, layer)]
        for name, written, before, now in zip("KV", (k, v), planes, after, strict=False):
            if not self._same(written, now[chosen.to(self._device)]):
                return self._complaint(layer, f"{name} written by the engine did not appear where the layout has it")
            rest = others.to(self._device)
            if not torch.equal(before.flatten(0, 1)[rest], now[rest]):
                return self._complaint(layer, f"writing some tokens changed the {name} of others")
        return None

    def packed_form(self, layers: list[int], because: str = "") -> KVLayout:
        """The layout as whole pages, if every block's tokens fill exactly its own page."""
        at = self._layout
        for layer in layers:
            fault = self._fault_of_pages(layer)
            if fault is not None:
                raise UnknownLayoutError(self._complaint(layer, f"{fault}. {because}".strip()))
        name = at.name if at.packed else "packed"
        return replace(at, name=name, planes=(), packing=self._packing())

    def _fault_of_pages(self, layer: int) -> str | None:
        at = self._layout
        block, *neighbours = reversed(self._blocks)
        pages = at.page_view(self._tensors, layer).view(same_size_word(at.dtype))
        tokens = at.block_size * at.num_heads * at.head_dim
        if pages.shape[1] != 2 * tokens:
            return f"a page holds {pages.shape[1]} elements, but the K and V of its tokens are {2 * tokens}"
        k, v = self._pattern(at.block_size), self._pattern(at.block_size)
        slots = self._slots(torch.tensor([block])).to(self._device)
        with self._kept_pages(layer):
            others = pages[neighbours].clone()
            self._writer(layer, k, v, slots)
            first = pages[block].clone()
            # Every number is another than before, so every element of the page must be, or some lie elsewhere.
            self._writer(layer, -k, -v, slots)
            moved = bool((pages[block] != first).all())
            alone = torch.equal(pages[neighbours], others)
        if not moved:
            return "the tokens of a block do not fill its page"
        return None if alone else "the tokens of a block also change another page"

    def _packing(self) -> str:
        """A digest of the page that a fixed block of tokens gives: equal digests mean equal packing."""
        at = self._layout
        block = self._blocks[-1]
        count = torch.arange(at.block_size * at.num_heads * at.head_dim)
        k, v = (
            (count * step % 251 - 125).to(self._dtype).view(at.block_size, at.num_heads, at.head_dim).to(self._device)
            for step in (97, 163)
        )
        with self._kept_pages(0):
            self._writer(0, k, v, self._slots(torch.tensor([block])).to(self._device))
            page = at.page_view(self._tensors, 0)[block].clone()
        return blake3(page.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    def _pattern(self, tokens: int) -> torch.Tensor:
        """Random ``[tokens, heads, dim]``, no element zero."""
        shape = (tokens, self._layout.num_heads, self._layout.head_dim)
        if self._exact:
            values = torch.rand(shape, generator=self._random) + 0.5
            signs = torch.randint(0, 2, shape, generator=self._random) * 2 - 1
            return (values * signs).to(self._dtype).to(self._device)
        choice = torch.randint(0, len(_FP8_EXACT), shape, generator=self._random)
        return torch.tensor(_FP8_EXACT)[choice].to(self._dtype).to(self._device)

    def _same(self, written: torch.Tensor, found: torch.Tensor) -> bool:
        """Whether ``found``, as words, is ``written``."""
        if self._exact:
            return torch.equal(written.to(self._layout.dtype).view(found.dtype), found)
        # A writer may scale before it rounds to fp8: equal numbers must give equal bytes, others other bytes.
        codes = [found[written == number] for number in _FP8_EXACT]
        codes = [code for code in codes if len(code)]
        return all(bool((code == code[0]).all()) for code in codes) and len({int(code[0]) for code in codes}) == len(
            codes
        )

    def _slots(self, blocks: torch.Tensor) -> torch.Tensor:
        size = self._layout.block_size
        return (blocks[:, None] * size + torch.arange(size)).flatten()

    @contextmanager
    def _kept(self, planes: Sequence[torch.Tensor], layer: int) -> Iterator[None]:
        """Put back what ``planes``, copies of our blocks, held."""
        try:
            yield
        finally:
            for plane, held in zip(self._layout.plane_views(self._tensors, layer), planes, strict=True):
                plane.view(held.dtype)[self._blocks] = held

    @contextmanager
    def _kept_pages(self, layer: int) -> Iterator[None]:
        pages = self._layout.page_view(self._tensors, layer).view(same_size_word(self._layout.dtype))
        held = pages[self._blocks]
        try:
            yield
        finally:
            pages[self._blocks] = held

    def _complaint(self, layer: int, what: str) -> str:
        at = self._layout
        tensor = self._tensors[layer]
        return (
            f"The KV pages of layer {layer} are not laid out as {at.name!r}: {what}. They have shape "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}, {str(at.dtype).removeprefix('torch.')}; blocks of "
            f"{at.block_size} tokens, {at.num_heads} heads of {at.head_dim} were expected."
        )
