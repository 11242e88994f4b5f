"""The far end of a store or retrieve: the pages or tensors that chunks in host memory are copied from and to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch

from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import TOKEN_MAJOR, LMCacheEngineMetadata
from lmcache.paging.elements import same_size_word
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.prompt import Chunk

Parts: TypeAlias = "Sequence[tuple[Chunk, MemoryObj]]"

LayerKV: TypeAlias = "tuple[torch.Tensor, ...]"
"""(k, v) of one layer, each ``[T, H, D]`` ('vllm') or ``[H, T, D]`` ('huggingface'); MLA has one tensor instead."""

KVCache: TypeAlias = "torch.Tensor | Sequence[LayerKV]"
"""All layers: one blob ``[L, 2, T, H, D]`` ('vllm') or ``[L, 2, H, T, D]`` ('huggingface'), or a LayerKV for each."""


class HostLayout(Protocol):
    """How chunks lie in host memory on one path: a connector, or :class:`TensorFormat`."""

    @property
    def layout(self) -> str: ...

    @property
    def num_layers(self) -> int: ...

    def spec(self, num_tokens: int) -> KVSpec: ...


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)`` for equal shapes and dtypes, byte for byte.

    On one thread numpy copies runs of many kilobytes a tenth faster than torch.
    """
    if source.device.type != "cpu" or torch.get_num_threads() > 1:
        target.copy_(source)
        return
    word = same_size_word(source.dtype)
    np.copyto(target.view(word).numpy(), source.detach().view(word).numpy())


class Source(Protocol):
    def gather(self, parts: Parts) -> None:
        """Fill each object with its chunk, every layer."""


class LayerSource(Protocol):
    def gather_layer(self, layer: int, parts: Parts, sent: LayerKV | None) -> None:
        """Fill one layer of each object. ``sent`` is what the caller sent into the generator for this layer."""


class PagedKV:
    """An engine's pages, behind its connector."""

    def __init__(
        self, connector: GPUConnectorInterface, slot_mapping: torch.Tensor, num_tokens: int, start: int
    ) -> None:
        """Args:
        slot_mapping: int64 ``[num_tokens]``.
        start: pages of the tokens before it must not be touched.

        Raises:
            ValueError: ``slot_mapping`` is of another type or shape.
        """
        if slot_mapping.dtype != torch.int64 or tuple(slot_mapping.shape) != (num_tokens,):
            raise ValueError(
                f"slot_mapping: expected int64 [{num_tokens}], one slot a token, "
                f"got {slot_mapping.dtype} {list(slot_mapping.shape)}"
            )
        self._connector = connector
        self._start = start
        self._slots = slot_mapping

    def gather(self, parts: Parts) -> None:
        if parts:
            self._connector.batched_from_gpu(*objs_and_ranges(parts), self._slots)

    def gather_layer(self, layer: int, parts: Parts, sent: LayerKV | None) -> None:
        if sent is not None:
            raise ValueError("store_layer: with slot_mapping the KV is read from the pages; advance with next()")
        if parts:
            self._connector.layer_from_gpu(layer, *objs_and_ranges(parts), self._slots)

    def scatter(self, parts: Parts) -> None:
        if parts:
            self._connector.batched_to_gpu(*objs_and_ranges(parts), self._wanted_slots(parts))

    def scatter_layer(self, layer: int, parts: Parts) -> None:
        if parts:
            self._connector.layer_to_gpu(layer, *objs_and_ranges(parts), self._wanted_slots(parts))

    def _wanted_slots(self, parts: Parts) -> torch.Tensor:
        """The slots, −1 for tokens of ``parts`` that are not wanted: before the start, or beyond the prompt."""
        first, last = parts[0][0].start, parts[-1][0].end
        if first >= self._start and last <= len(self._slots):
            return self._slots
        slots = torch.nn.functional.pad(self._slots, (0, max(0, last - len(self._slots))), value=-1)
        slots[: self._start] = -1
        return slots


def objs_and_ranges(parts: Parts) -> tuple[list[MemoryObj], list[tuple[int, int]]]:
    return [obj for _, obj in parts], [(chunk.start, chunk.end) for chunk, _ in parts]


@dataclass(frozen=True)
class TensorFormat:
    """How KV looks on the tensor path. All work is done on token-major views ``[L, planes, T, H, D]``."""

    num_layers: int
    planes: int
    heads: int
    dim: int
    dtype: torch.dtype
    heads_first: bool

    @classmethod
    def of(cls, metadata: LMCacheEngineMetadata) -> TensorFormat:
        layers, planes, _, heads, dim = metadata.kv_shape
        return cls(layers, planes, heads, dim, metadata.kv_dtype, metadata.fmt == "huggingface")

    @property
    def layout(self) -> str:
        return TOKEN_MAJOR

    def spec(self, num_tokens: int) -> KVSpec:
        shape = (self.num_layers, self.planes, num_tokens, self.heads, self.dim)
        return KVSpec(shape, self.dtype, TOKEN_MAJOR, num_tokens)

    def blob_shape(self, num_tokens: int) -> tuple[int, ...]:
        """``[L, planes, T, H, D]``, or ``[L, planes, H, T, D]`` for 'huggingface'."""
        tail = (self.heads, num_tokens) if self.heads_first else (num_tokens, self.heads)
        return (self.num_layers, self.planes, *tail, self.dim)

    def token_major(self, kv: torch.Tensor) -> torch.Tensor:
        """A view with tokens before heads: ``[…, T, H, D]``."""
        return kv.transpose(-3, -2) if self.heads_first else kv

    def check(self, what: str, kv: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Raises:
        ValueError: ``kv`` is no tensor, or one of another dtype or shape.
        """
        got = f"{kv.dtype} {list(kv.shape)}" if isinstance(kv, torch.Tensor) else type(kv).__name__
        expected = f"{self.dtype} {list(shape)}"
        if got != expected:
            raise ValueError(f"{what}: expected {expected}, got {got}")

    def check_layer(self, what: str, kv: LayerKV, num_tokens: int) -> list[torch.Tensor]:
        """Token-major views of one layer's tensors.

        Raises:
            ValueError: another number of tensors, dtype or shape.
        """
        if not isinstance(kv, (tuple, list)) or len(kv) != self.planes:
            got = f"{len(kv)} tensors" if isinstance(kv, (tuple, list)) else type(kv).__name__
            raise ValueError(f"{what}: expected a tuple of {self.planes} tensors, got {got}")
        for name, plane in zip("kv", kv, strict=False):
            self.check(f"{what}.{name}", plane, self.blob_shape(num_tokens)[2:])
        return [self.token_major(plane) for plane in kv]


class TensorSource:
    """KV of a whole prompt in the caller's tensors, on any device."""

    def __init__(self, fmt: TensorFormat, kv: KVCache, num_tokens: int) -> None:
        """Raises:
        ValueError: ``kv`` is not what ``fmt`` and ``num_tokens`` ask for.
        """
        self._blob: torch.Tensor | None = None
        self._layers: list[list[torch.Tensor]] = []
        if isinstance(kv, torch.Tensor):
            fmt.check("kv", kv, fmt.blob_shape(num_tokens))
            self._blob = fmt.token_major(kv)
            return
        if len(kv) != fmt.num_layers:
            raise ValueError(f"kv: expected {fmt.num_layers} layers, got {len(kv)}")
        self._layers = [fmt.check_layer(f"kv[{i}]", layer, num_tokens) for i, layer in enumerate(kv)]

    def gather(self, parts: Parts) -> None:
        for chunk, obj in parts:
            target = obj.tensor
            if self._blob is not None:
                copy_bytes(target, self._blob[:, :, chunk.start : chunk.end])
                continue
            for layer, planes in zip(target, self._layers, strict=True):
                for plane, source in zip(layer, planes, strict=True):
                    plane.copy_(source[chunk.start : chunk.end])


class SentLayers:
    """KV that the caller sends into ``store_layer``, a layer at a time."""

    def __init__(self, fmt: TensorFormat, num_tokens: int) -> None:
        self._fmt = fmt
        self._num_tokens = num_tokens

    def gather_layer(self, layer: int, parts: Parts, sent: LayerKV | None) -> None:
        if sent is None:
            raise ValueError(f"store_layer: send (k, v) of layer {layer}; next() alone is for slot_mapping")
        planes = self._fmt.check_layer(f"layer {layer}", sent, self._num_tokens)
        for chunk, obj in parts:
            for plane, source in zip(obj.tensor[layer], planes, strict=True):
                plane.copy_(source[chunk.start : chunk.end])


class TensorTarget:
    """A blob on the CPU for the tokens ``[start, end)``: a fresh one, or the beginning of the caller's."""

    def __init__(self, fmt: TensorFormat, start: int, end: int, out: torch.Tensor | None = None) -> None:
        """Args:
        out: a blob of at least ``end - start`` tokens, in the same format.

        Raises:
            ValueError: ``out`` is of another shape or dtype, or too short.
        """
        self._fmt = fmt
        self._start = start
        self._end = end
        shape = fmt.blob_shape(end - start)
        if out is None:
            out = torch.empty(shape, dtype=fmt.dtype)
        self._token_dim = 3 if fmt.heads_first else 2
        room = out.shape[self._token_dim] if out.dim() == len(shape) else 0
        if out.dtype != fmt.dtype or room < end - start or tuple(out.shape) != tuple(fmt.blob_shape(room)):
            raise ValueError(
                f"out: expected {fmt.dtype} {list(shape)} or more tokens, got {out.dtype} {list(out.shape)}"
            )
        self._blob = out.narrow(self._token_dim, 0, end - start)
        self._view = fmt.token_major(self._blob)  # [L, planes, T', H, D]

    def scatter(self, parts: Parts) -> None:
        for chunk, obj in parts:
            self._copy(chunk, obj.tensor, self._view)

    def scatter_layer(self, layer: int, parts: Parts) -> None:
        for chunk, obj in parts:
            self._copy(chunk, obj.tensor[layer : layer + 1], self._view[layer : layer + 1])

    def _copy(self, chunk: Chunk, source: torch.Tensor, target: torch.Tensor) -> None:
        start, end = max(chunk.start, self._start), min(chunk.end, self._end)
        wanted = source[:, :, start - chunk.start : end - chunk.start]
        copy_bytes(target[:, :, start - self._start : end - self._start], wanted)

    def blob(self, end: int) -> torch.Tensor:
        """What was retrieved, up to token ``end``; a view."""
        return self._blob.narrow(self._token_dim, 0, end - self._start)

    def layer(self, layer: int) -> LayerKV:
        return self._blob[layer].unbind(0)
