"""Passages in the cache: found by their own tokens, wherever they stood and wherever they will stand."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType

import torch

from lmcache.blend.kv_source import KVLoadError
from lmcache.blend.segment_format import SEGMENT_LAYOUT, SegmentFormat, context_digest
from lmcache.cache_engine import LMCacheEngine
from lmcache.keys import Tokens, segment_key
from lmcache.memory.memory_obj import MemoryObj
from lmcache.observability.logging import init_logger, log_limited
from lmcache.storage.kv_storage import Found

logger = init_logger(__name__)


class StoredSegment:
    """A passage held in host memory until :meth:`release`; a :class:`lmcache.blend.kv_source.KVSource`.

    ``start`` is the position of its first token when its keys were rotated, ``length`` the length of the prompt then.
    """

    def __init__(self, obj: MemoryObj, tier: str) -> None:
        """Takes over the reference of ``obj``, unless it raises.

        Raises:
            KVLoadError: the bytes are no passage.
        """
        self._format = SegmentFormat.read(obj.bytes)
        self._obj: MemoryObj | None = obj
        self.tier = tier
        self.num_tokens = self._format.header.num_tokens
        self.num_layers = len(self._format.header.layers)
        self.start = self._format.header.start
        self.length = self._format.header.length

    def follows(self, before: Tokens) -> bool:
        """Whether exactly these tokens stood before it, so that its KV is right as it is."""
        return self.start == len(before) and self._format.header.before == context_digest(before)

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`lmcache.blend.kv_source.KVSource`. Views of the cache's memory, valid until :meth:`release`."""
        if self._obj is None:
            raise KVLoadError("the passage was released before it was used")
        if layer_id >= self.num_layers:
            raise KVLoadError(f"layer {layer_id} is wanted of a passage that was stored with {self.num_layers} layers")
        return self._format.layer(self._obj.bytes, layer_id)

    def release(self) -> None:
        """Let the cache evict it again. Idempotent."""
        obj, self._obj = self._obj, None
        if obj is not None:
            obj.ref_down()

    def __enter__(self) -> StoredSegment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class SegmentStore:
    """The passages of one model in an engine's tiers; ``lora`` and ``cache_salt`` isolate adapters and tenants.

    A passage is kept once: the first KV that is stored for it stays. A fault of a tier is a miss. Thread-safe.
    """

    def __init__(self, engine: LMCacheEngine, *, lora: str = "", cache_salt: str = "") -> None:
        self._storage = engine.storage
        self._metrics = engine.metrics
        self._max_wait = engine.config.max_disk_wait_seconds
        self._namespace = engine.metadata.namespace(
            SEGMENT_LAYOUT, lora=lora, cache_salt=cache_salt, codec=engine.config.inexact_codec
        )

    def contains(self, tokens: Tokens) -> bool:
        return self._storage.contains(segment_key(self._namespace, tokens))

    def put(
        self,
        tokens: Tokens,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        before: Tokens = (),
        length: int | None = None,
    ) -> bool:
        """Keep the KV of a passage; False when no tier will, or when there is no room for it.

        Args:
            tokens: the passage's, ``T`` of them.
            keys: ``[T, kv_heads, dim]`` a layer, on any device, rotated to positions ``len(before) …``.
            values: likewise.
            before: all tokens that stood before it in its prompt.
            length: tokens of that prompt; None: it ended with the passage.
        """
        key = segment_key(self._namespace, tokens)
        if self._storage.renew(key):
            return True
        end = len(before) + len(tokens)
        form = SegmentFormat.of(keys, values, start=len(before), length=length or end, before=context_digest(before))
        if form.header.num_tokens != len(tokens):
            raise ValueError(f"KV of {form.header.num_tokens} tokens for a passage of {len(tokens)}")
        obj = self._storage.allocate(form.spec)
        if obj is None:
            return False
        with obj:
            form.write(obj.bytes, keys, values)
            kept = self._storage.put(key, obj)
        if kept:
            self._metrics.stored(len(tokens))
        return kept

    def get(self, tokens: Tokens) -> StoredSegment | None:
        """The passage, or None; waits for a slower tier, ``max_disk_wait_seconds`` at most."""
        return self.get_many([tokens])[0]

    def get_many(self, passages: Sequence[Tokens]) -> list[StoredSegment | None]:
        """:meth:`get` of several, which are read at the same time. The caller releases each."""
        deadline = time.monotonic() + self._max_wait
        found = self._storage.acquire_each([segment_key(self._namespace, tokens) for tokens in passages])
        self._metrics.requested(sum(len(tokens) for tokens in passages))
        return [self._opened(hit, len(tokens), deadline) for hit, tokens in zip(found, passages, strict=True)]

    def _opened(self, hit: Found | None, num_tokens: int, deadline: float) -> StoredSegment | None:
        if hit is None:
            return None
        obj = hit.obj
        if hit.read is not None:
            try:
                obj = hit.read.result(timeout=max(0.0, deadline - time.monotonic()))
            except FutureTimeoutError:
                # When it arrives at last, its reference must be given back.
                hit.read.add_done_callback(_give_back)
        if obj is None:
            return None
        try:
            segment = StoredSegment(obj, hit.tier.name)
            if segment.num_tokens != num_tokens:
                raise KVLoadError(f"{segment.num_tokens} tokens are stored for a passage of {num_tokens}")
        except KVLoadError as error:
            obj.ref_down()
            self._metrics.failure("segment_header")
            log_limited(
                logger,
                logging.ERROR,
                "segment_header",
                "a stored passage is not used: %s (further ones not logged for a minute)",
                error,
            )
            return None
        self._metrics.reused(hit.tier.name, num_tokens)
        return segment


def _give_back(read: Future[MemoryObj | None]) -> None:
    obj = read.result()
    if obj is not None:
        obj.ref_down()
