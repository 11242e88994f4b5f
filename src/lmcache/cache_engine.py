"""``LMCacheEngine``: store, find and retrieve the KV of prompts."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, overload

import torch

from lmcache.chunk_writes import ChunkWrites
from lmcache.config import LMCacheEngineConfig
from lmcache.keys import CacheKey, Namespace, PrefixKey, Tokens, prefix_keys
from lmcache.kv_ends import (
    HostLayout,
    KVCache,
    LayerKV,
    LayerSource,
    PagedKV,
    SentLayers,
    Source,
    TensorFormat,
    TensorSource,
    TensorTarget,
)
from lmcache.lease import PrefixLease
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.observability.events import CacheStoreEvent, EventBuffer
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.prompt import Chunk, Prompt, cut, leading_false
from lmcache.retrieval import Target, all_arrived, copy_arriving, send_ahead
from lmcache.storage.inquiry import Inquiry
from lmcache.storage.interface import TierStats
from lmcache.storage.kv_storage import KVStorage


@dataclass(frozen=True)
class EngineStats:
    """Counters since start, in tokens: asked for, reused by tier, newly stored; and what each tier says of itself."""

    requested_tokens: int
    reused_tokens: dict[str, int]
    stored_tokens: int
    tiers: dict[str, TierStats]


class LMCacheEngine:
    """Exact prefix reuse: what comes back for a prefix is byte for byte what was stored for it.

    Two paths. On the *tensor path* KV is passed as tensors: a blob ``[L, 2, T, H, D]`` (``[L, 2, H, T, D]`` when
    ``metadata.fmt`` is "huggingface") or (k, v) per layer; MLA has one plane instead of two. On the *paged path*,
    chosen by passing ``slot_mapping`` (int64 ``[T]``, −1 for tokens to leave alone), KV moves between an engine's pages
    and host memory. The two keep other bytes for a chunk, and so never share entries.

    ``mask`` (bool ``[T]``: a run of False, then of True) leaves out leading tokens: they are there already. ``T`` is
    always the whole prompt. ``lora`` and ``cache_salt`` isolate adapters and tenants.

    A fault of a tier is a miss; only a caller's mistake raises (ValueError), and what the connector raises passes
    through. Thread-safe.
    """

    def __init__(
        self,
        config: LMCacheEngineConfig,
        metadata: LMCacheEngineMetadata,
        storage: KVStorage,
        gpu_connector: GPUConnectorInterface | None = None,
    ) -> None:
        """Takes over ``storage``: :meth:`close` closes it. Its metrics are the engine's.

        Raises:
            ValueError: ``config`` and ``metadata`` disagree about the size of a chunk.
        """
        if metadata.kv_shape[2] != config.chunk_size:
            raise ValueError(
                f"chunk_size={config.chunk_size}, but the metadata's kv_shape {metadata.kv_shape} has "
                f"{metadata.kv_shape[2]} tokens a chunk: both must be the same"
            )
        self.config = config
        self.metadata = metadata
        self.storage = storage
        self.metrics = storage.metrics
        self.gpu_connector = gpu_connector
        self._format = TensorFormat.of(metadata)
        self._events = EventBuffer()
        self._writes = ChunkWrites(storage, self._events if config.enable_kv_events else None)
        # Making one takes as long as hashing a thousand tokens.
        self._namespace = lru_cache(maxsize=1024)(
            lambda layout, lora, cache_salt: metadata.namespace(
                layout, lora=lora, cache_salt=cache_salt, codec=config.inexact_codec
            )
        )

    def set_gpu_connector(self, connector: GPUConnectorInterface) -> None:
        """Say how KV moves to and from the engine's pages; integrations learn that after the engine exists."""
        self.gpu_connector = connector

    # Keys

    def namespace(self, *, lora: str = "", cache_salt: str = "", paged: bool) -> Namespace:
        return self._namespace(self._host(paged).layout, lora, cache_salt)

    def prefix_keys(
        self, tokens: Tokens, *, lora: str = "", cache_salt: str = "", paged: bool = False
    ) -> list[PrefixKey]:
        """Keys of the chunks of ``tokens``; with ``save_unfull_chunk`` also of a last one that is not full."""
        namespace = self.namespace(lora=lora, cache_salt=cache_salt, paged=paged)
        return prefix_keys(namespace, tokens, self.config.chunk_size, include_partial=self.config.save_unfull_chunk)

    # Looking up

    def ask(self, keys: Sequence[CacheKey]) -> Inquiry:
        """Have shared stores say which of ``keys`` they hold, in ``remote_lookup_seconds``. Never blocks; what was
        answered is found from then on."""
        return self.storage.ask(keys, self.config.remote_lookup_seconds)

    def lookup(self, tokens: Tokens, *, lora: str = "", cache_salt: str = "", paged: bool = False) -> int:
        """How many leading tokens could be reused now. Touches only indexes, holds nothing; a shared store is asked,
        which may take ``remote_lookup_seconds``."""
        keys = self.prefix_keys(tokens, lora=lora, cache_salt=cache_salt, paged=paged)
        self._wait_for_stores(keys)
        hits = self.storage.find(keys)
        count = self._num_tokens(len(hits), tokens)
        return count if count >= self.config.min_retrieve_tokens else 0

    def contains(self, tokens: Tokens, *, lora: str = "", cache_salt: str = "", paged: bool = False) -> bool:
        """Whether every chunk of ``tokens`` is held (with ``save_unfull_chunk`` also a last one that is not full)."""
        keys = self.prefix_keys(tokens, lora=lora, cache_salt=cache_salt, paged=paged)
        self._wait_for_stores(keys)
        return bool(keys) and len(self.storage.find(keys)) == len(keys)

    def prefetch(
        self,
        tokens: Tokens,
        *,
        lora: str = "",
        cache_salt: str = "",
        paged: bool = False,
        keys: Sequence[PrefixKey] | None = None,
        ask_stores: bool = False,
    ) -> PrefixLease:
        """Hold what can be reused, and start reading what lies in slower tiers. Never blocks without ``ask_stores``.

        Args:
            keys: of :meth:`prefix_keys` for the same arguments, if the caller has them.
            ask_stores: wait until shared stores have said what they hold, ``remote_lookup_seconds`` at most. Without
                it, only what they have said before counts; see :meth:`ask`.
        """
        with self.metrics.timed("prefetch"):
            prompt = self._prompt(tokens, None, keys, paged, lora, cache_salt)
            if ask_stores:
                self._wait_for_stores([chunk.key for chunk in prompt.chunks])
            return self._lease(prompt.chunks, 0, len(prompt), paged)

    # Retrieving

    def send_ahead(self, lease: PrefixLease, start: int = 0) -> None:
        """A :meth:`retrieve` into pages, of what ``lease`` holds from token ``start`` on, is likely to come next: where
        there is a long way to them, have the first bytes set out. Never waits."""
        send_ahead(lease, self._connector(), start)

    @overload
    def retrieve(
        self, tokens: Tokens, mask: torch.Tensor | None = ..., return_tuple: Literal[True] = ..., *,
        slot_mapping: None = ..., lora: str = ..., cache_salt: str = ..., lease: PrefixLease | None = ...,
        out: torch.Tensor | None = ...,
    ) -> tuple[tuple[LayerKV, ...], torch.Tensor]: ...  # fmt: skip
    @overload
    def retrieve(
        self, tokens: Tokens, mask: torch.Tensor | None = ..., return_tuple: bool = ..., *,
        slot_mapping: None = ..., lora: str = ..., cache_salt: str = ..., lease: PrefixLease | None = ...,
        out: torch.Tensor | None = ...,
    ) -> tuple[torch.Tensor | tuple[LayerKV, ...], torch.Tensor]: ...  # fmt: skip
    @overload
    def retrieve(
        self, tokens: Tokens, mask: torch.Tensor | None = ..., return_tuple: bool = ..., *,
        slot_mapping: torch.Tensor, lora: str = ..., cache_salt: str = ..., lease: PrefixLease | None = ...,
    ) -> torch.Tensor: ...  # fmt: skip
    def retrieve(
        self,
        tokens: Tokens,
        mask: torch.Tensor | None = None,
        return_tuple: bool = True,
        *,
        slot_mapping: torch.Tensor | None = None,
        lora: str = "",
        cache_salt: str = "",
        lease: PrefixLease | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | tuple[LayerKV, ...], torch.Tensor] | torch.Tensor:
        """Get the KV of the tokens that follow those left out by ``mask``, as far as it is held.

        Waits for reads from slower tiers, ``max_disk_wait_seconds`` at most, and copies each chunk as it arrives.

        Args:
            lease: of :meth:`prefetch` for these tokens, or for more of the same prompt; stays the caller's. Without
                one, one is taken and given back. ``min_retrieve_tokens`` was applied when it was taken.
            out: tensor path only: a blob of as many tokens as are wanted, or more, to write into. Memory that was in
                use before is filled several times faster than what the system must clear first.

        Returns:
            Tensor path: ``(kv, found)``. ``found`` is bool ``[T]``, on the CPU. ``kv`` are the found tokens, in memory
            of their own or at the beginning of ``out``: (k, v) per layer with ``return_tuple``, else a blob; ``()``
            when there are none.
            Paged path: ``found`` alone; the pages of the found tokens are written.
        """
        start = leading_false(mask, len(tokens))
        with (
            self.metrics.timed("retrieve"),
            self._held(lease, tokens, start, slot_mapping is not None, lora, cache_salt) as held,
        ):
            limit = min(held.num_tokens, len(tokens))
            if slot_mapping is not None:
                if out is not None:
                    raise ValueError("out is for the tensor path; with slot_mapping the KV goes into the pages")
                pages = self._pages(slot_mapping, len(tokens), start)
                return self._found(held, start, self._copy(held, pages, start, limit), len(tokens))
            target = TensorTarget(self._format, start, max(start, limit), out)
            end = self._copy(held, target, start, limit)
            found = self._found(held, start, end, len(tokens))
            if end == start:
                return (), found
            blob = target.blob(end)
            return tuple(layer.unbind(0) for layer in blob) if return_tuple else blob, found

    @overload
    def retrieve_layer(
        self, tokens: Tokens, mask: torch.Tensor | None = ..., *, slot_mapping: None = ...,
        lora: str = ..., cache_salt: str = ..., lease: PrefixLease | None = ...,
    ) -> Generator[LayerKV, None, torch.Tensor]: ...  # fmt: skip
    @overload
    def retrieve_layer(
        self, tokens: Tokens, mask: torch.Tensor | None = ..., *, slot_mapping: torch.Tensor,
        lora: str = ..., cache_salt: str = ..., lease: PrefixLease | None = ...,
    ) -> Generator[int, None, torch.Tensor]: ...  # fmt: skip
    def retrieve_layer(
        self,
        tokens: Tokens,
        mask: torch.Tensor | None = None,
        *,
        slot_mapping: torch.Tensor | None = None,
        lora: str = "",
        cache_salt: str = "",
        lease: PrefixLease | None = None,
    ) -> Generator[LayerKV | int, None, torch.Tensor]:
        """:meth:`retrieve`, a layer a step.

        The first step waits for every chunk (each holds all layers). Step ``l`` ends with layer ``l`` in place and
        yields, on the tensor path, its (k, v) of the found tokens, on the paged path the end of the found tokens.
        After the last layer the generator returns ``found``; when nothing is found it does so at once. It may be
        closed at any step.
        """
        # Here and not in the generator, so that a mistake shows before its first step.
        start = leading_false(mask, len(tokens))
        pages = None if slot_mapping is None else self._pages(slot_mapping, len(tokens), start)
        return self._retrieve_layers(tokens, start, pages, lease, lora, cache_salt)

    def _retrieve_layers(
        self, tokens: Tokens, start: int, pages: PagedKV | None, lease: PrefixLease | None, lora: str, cache_salt: str
    ) -> Generator[LayerKV | int, None, torch.Tensor]:
        paged, timeout = pages is not None, self.config.max_disk_wait_seconds
        with (
            self._held(lease, tokens, start, paged, lora, cache_salt) as held,
            all_arrived(held, start, len(tokens), timeout) as (parts, end),
        ):
            found = self._found(held, start, end, len(tokens))
            if end == start:
                return found
            target = pages or TensorTarget(self._format, start, end)
            for layer in range(self._host(paged).num_layers):
                target.scatter_layer(layer, parts)
                yield target.layer(layer) if isinstance(target, TensorTarget) else end
            return found

    # Storing

    def store(
        self,
        tokens: Tokens,
        kv: KVCache | None = None,
        mask: torch.Tensor | None = None,
        *,
        slot_mapping: torch.Tensor | None = None,
        lora: str = "",
        cache_salt: str = "",
        keys: Sequence[PrefixKey] | None = None,
    ) -> int:
        """Keep the chunks of ``tokens`` that are not held yet; returns how many tokens these were.

        Chunks that begin before the first True of ``mask`` are left out. Slower tiers get theirs behind the caller's
        back. A chunk that another thread is storing at this moment is left to it.

        Args:
            kv: the KV of all ``T`` tokens, on any device; None on the paged path.
            keys: of :meth:`prefix_keys` for the same arguments, if the caller has them.
        """
        paged = slot_mapping is not None
        if (kv is None) != paged:
            raise ValueError("store takes either kv (tensor path) or slot_mapping (paged path)")
        with self.metrics.timed("store"):
            prompt = self._prompt(tokens, mask, keys, paged, lora, cache_salt)
            source: Source
            if kv is not None:
                source = TensorSource(self._format, kv, len(prompt))
            else:
                assert slot_mapping is not None
                source = self._pages(slot_mapping, len(prompt), prompt.start)
            with self._writes.prepare(prompt.wanted(), self._host(paged).spec) as parts:
                source.gather(parts)
                return self._writes.publish(prompt, parts)

    def store_layer(
        self,
        tokens: Tokens,
        mask: torch.Tensor | None = None,
        *,
        slot_mapping: torch.Tensor | None = None,
        lora: str = "",
        cache_salt: str = "",
        keys: Sequence[PrefixKey] | None = None,
    ) -> Generator[int, LayerKV | None, int]:
        """:meth:`store`, a layer a step: ``L + 1`` steps that yield 0, 1, … ``L``, the number of layers taken.

        The first step (``next``) reserves memory. On the tensor path, then ``send`` the (k, v) of layers 0, 1, …, each
        of all ``T`` tokens. On the paged path, call ``next`` when the pages of layer 0, 1, … are written. The step that
        yields ``L`` has made everything visible; the generator then returns the number of tokens newly stored. Closed
        or failed before, nothing of it is ever seen.
        """
        paged = slot_mapping is not None
        prompt = self._prompt(tokens, mask, keys, paged, lora, cache_salt)
        source: LayerSource
        if slot_mapping is None:
            source = SentLayers(self._format, len(prompt))
        else:
            source = self._pages(slot_mapping, len(prompt), prompt.start)
        return self._writes.store_layers(prompt, source, self._host(paged))

    def store_chunks(self, chunks: Sequence[Chunk], slot_mapping: torch.Tensor) -> int:
        """Keep single chunks of a prompt from the pages, each found by its own key, without those before it.

        Args:
            chunks: named by ``SegmentKey``, each of at most ``chunk_size`` tokens.
            slot_mapping: of all tokens of the prompt.

        Returns:
            How many tokens are newly held.
        """
        with self.metrics.timed("store"), self._writes.prepare(chunks, self._host(True).spec) as parts:
            self._pages(slot_mapping, len(slot_mapping), 0).gather(parts)
            return self._writes.publish_each(parts)

    # Keeping and forgetting

    def pin(self, tokens: Tokens, *, lora: str = "", cache_salt: str = "", paged: bool = False) -> int:
        """Hold what there is of ``tokens`` against eviction until :meth:`unpin`; how many leading tokens that is."""
        pinned = self.storage.pin(self.prefix_keys(tokens, lora=lora, cache_salt=cache_salt, paged=paged))
        return self._num_tokens(pinned, tokens)

    def unpin(self, tokens: Tokens, *, lora: str = "", cache_salt: str = "", paged: bool = False) -> None:
        """Undo one :meth:`pin` of the same tokens; without one, nothing happens."""
        self.storage.unpin(self.prefix_keys(tokens, lora=lora, cache_salt=cache_salt, paged=paged))

    def clear(self) -> int:
        """Forget everything that is not pinned, in every tier, also what is leased or on its way to a slower tier
        (leases stay valid). Returns how many entries went, counting each tier's."""
        return self.storage.clear()

    # The whole

    def stats(self) -> EngineStats:
        tiers = self.storage.stats()
        return EngineStats(
            requested_tokens=self._counted("requested_tokens"),
            reused_tokens={name: self._counted("reused_tokens", tier=name) for name in tiers},
            stored_tokens=self._counted("stored_tokens"),
            tiers=tiers,
        )

    def take_events(self) -> list[CacheStoreEvent]:
        """One for each chunk stored since the last call; none without ``enable_kv_events``."""
        return self._events.take()

    def close(self) -> None:
        """Write what is on its way to slower tiers and give everything back; from now on all is a miss. Idempotent."""
        self.storage.close()

    # Parts of the above

    def _prompt(
        self,
        tokens: Tokens,
        mask: torch.Tensor | None,
        keys: Sequence[PrefixKey] | None,
        paged: bool,
        lora: str,
        cache_salt: str,
    ) -> Prompt:
        num_tokens, size = len(tokens), self.config.chunk_size
        if keys is None:
            keys = self.prefix_keys(tokens, lora=lora, cache_salt=cache_salt, paged=paged)
        elif len(keys) != (count := -(-num_tokens // size) if self.config.save_unfull_chunk else num_tokens // size):
            raise ValueError(f"keys: expected {count} for {num_tokens} tokens in chunks of {size}, got {len(keys)}")
        return Prompt(tokens, leading_false(mask, num_tokens), cut(num_tokens, keys, size), size)

    @contextmanager
    def _held(
        self, lease: PrefixLease | None, tokens: Tokens, start: int, paged: bool, lora: str, cache_salt: str
    ) -> Iterator[PrefixLease]:
        """``lease``, or one of our own of the chunks from token ``start`` on."""
        if lease is None:
            prompt = self._prompt(tokens, None, None, paged, lora, cache_salt)
            self._wait_for_stores([chunk.key for chunk in prompt.chunks])
            with self._lease(prompt.chunks[start // self.config.chunk_size :], start, len(prompt), paged) as own:
                yield own
        elif lease.layout != self._host(paged).layout:
            raise ValueError(f"lease: is of layout {lease.layout!r}, expected {self._host(paged).layout!r}")
        else:
            yield lease

    def _wait_for_stores(self, keys: Sequence[CacheKey]) -> None:
        self.ask(keys).wait()

    def _lease(self, chunks: Sequence[Chunk], start: int, num_tokens: int, paged: bool) -> PrefixLease:
        self.metrics.requested(num_tokens - start)
        return PrefixLease.take(
            self.storage,
            chunks,
            self._host(paged).spec,
            layout=self._host(paged).layout,
            min_end=start + self.config.min_retrieve_tokens,
        )

    def _copy(self, held: PrefixLease, target: Target, start: int, limit: int) -> int:
        return copy_arriving(held, target, start, limit, self.config.max_disk_wait_seconds)

    def _found(self, held: PrefixLease, start: int, end: int, num_tokens: int) -> torch.Tensor:
        """Bool ``[T]``, True for the tokens ``[start, end)``, which are counted as reused."""
        for tier, count in held.tokens_by_tier(start, end).items():
            self.metrics.reused(tier, count)
        found = torch.zeros(num_tokens, dtype=torch.bool)
        found[start:end] = True
        return found

    def _num_tokens(self, num_chunks: int, tokens: Tokens) -> int:
        return min(num_chunks * self.config.chunk_size, len(tokens))

    def _counted(self, name: str, **labels: str) -> int:
        return int(self.metrics.registry.get_sample_value(f"lmcache_{name}_total", labels) or 0)

    def _connector(self) -> GPUConnectorInterface:
        if self.gpu_connector is None:
            raise ValueError("the paged path needs a connector to the engine's pages: call set_gpu_connector first")
        return self.gpu_connector

    def _pages(self, slot_mapping: torch.Tensor, num_tokens: int, start: int) -> PagedKV:
        return PagedKV(self._connector(), slot_mapping, num_tokens, start)

    def _host(self, paged: bool) -> HostLayout:
        return self._connector() if paged else self._format
