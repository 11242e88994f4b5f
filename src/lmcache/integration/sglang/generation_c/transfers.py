"""Loads into SGLang's pools and stores out of them, each on a thread of its own; blends on SGLang's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from lmcache.cache_engine import LMCacheEngine
from lmcache.integration.guard import report_failure
from lmcache.integration.sglang.generation_c.operations import Load, Lookup, Store
from lmcache.keys import PrefixKey, Tokens
from lmcache.lease import PrefixLease


class Transfers:
    """Queues copies beside the forward. Nothing raises: what fails is a load of nothing, or a store of nothing."""

    def __init__(self, engine: LMCacheEngine, device: torch.device, forward_stream: Any = None) -> None:
        """``forward_stream``: that of SGLang's forwards, as far as it is known; None on a CPU."""
        self._engine = engine
        self._device = device
        self._forward_stream = forward_stream
        self._loading = ThreadPoolExecutor(1, "lmcache-load", initializer=self._use_device)
        self._storing = ThreadPoolExecutor(1, "lmcache-store", initializer=self._use_device)
        self._load_stream, self._store_stream = self._new_stream(), self._new_stream()

    def load(self, lookup: Lookup, load: Load, producer_stream: Any) -> None:
        """Start to fill the slots of ``load``; takes over the lease of ``lookup``.

        Args:
            producer_stream: the stream of SGLang's forwards, which may still write to slots that were freed.
        """
        before = self._queued(producer_stream)
        lease, lookup.lease = lookup.lease, None

        def run() -> bool:
            try:
                with self._on(self._load_stream, after=before):
                    load.all_found = self._retrieve(lookup, load, lease)
                    if self._load_stream is not None:
                        load.on_device = self._load_stream.record_event()
            finally:
                load.issued.set()
                try:
                    if load.on_device is not None:
                        load.on_device.synchronize()
                finally:
                    if lease is not None:
                        lease.release()
            return load.all_found

        self._submit("load_kv", self._loading, run, load.future)
        if load.future.done():
            load.issued.set()

    def blend(self, load: Load, fill: Callable[[], bool], forward_stream: Any) -> None:
        """Fill the slots of ``load`` by a forward of the model, here and now: SGLang's forwards run on this thread."""
        stream = None if self._device.type == "cpu" else forward_stream
        try:
            with self._on(stream, after=self._queued()):
                load.all_found = fill()
            if stream is not None:
                stream.synchronize()  # what the passages lie in is given back next
        except Exception as error:
            report_failure(self._engine.metrics, "blend", error)
            self._engine.metrics.blend_fallback("error")
            load.all_found = False
        load.issued.set()
        load.future.set_result(load.all_found)

    def store(
        self,
        request_id: str,
        tokens: Tokens,
        slots: torch.Tensor,
        start: int,
        *,
        keys: Sequence[PrefixKey],
        cache_salt: str,
        kept: Callable[[], None],
    ) -> Store:
        """Start to keep the KV of ``tokens[start:]``, which is in ``slots``; ``kept`` is called when it is.

        Args:
            keys: of the chunks of ``tokens``.
        """

        # The forward of these tokens may still run: a part of a long prompt is stored when the next part is scheduled.
        before = self._queued(self._forward_stream)

        def run() -> int:
            with self._on(self._store_stream, after=before):
                if self._store_stream is not None and self._forward_stream is None:
                    torch.get_device_module(self._device).synchronize(self._device)
                mapping = torch.nn.functional.pad(slots.to("cpu", torch.int64), (start, 0), value=-1)
                new = torch.arange(len(tokens)) >= start
                stored = self._engine.store(tokens, mask=new, slot_mapping=mapping, cache_salt=cache_salt, keys=keys)
                if self._store_stream is not None:
                    self._store_stream.synchronize()
            kept()
            return stored

        operation = Store(request_id, Future())
        self._submit("store_kv", self._storing, run, operation.future)
        return operation

    def close(self) -> None:
        """Wait for what is under way."""
        for executor in (self._loading, self._storing):
            executor.shutdown(wait=True)

    def _retrieve(self, lookup: Lookup, load: Load, lease: PrefixLease | None) -> bool:
        first, count = load.local_hit_tokens, len(load.device_indices)
        found = self._engine.retrieve(
            lookup.token_ids[: first + count],
            mask=torch.arange(first + count) >= first,
            slot_mapping=torch.nn.functional.pad(load.device_indices.to("cpu", torch.int64), (first, 0), value=-1),
            cache_salt=lookup.cache_salt,
            lease=lease,
        )
        return int(found.sum()) == count

    def _submit(self, name: str, executor: ThreadPoolExecutor, run: Callable[[], Any], future: Future[Any]) -> None:
        """``future`` gets what ``run`` gives, or 0: SGLang waits for it, so it must always end."""

        def work() -> None:
            result: Any = 0
            try:
                result = run()
            except Exception as error:
                report_failure(self._engine.metrics, name, error)
            finally:
                future.set_result(result)

        try:
            executor.submit(work)
        except RuntimeError:  # closed
            future.set_result(0)

    def _queued(self, *streams: Any) -> list[Any]:
        """Events behind all that SGLang has queued up to now on ``streams`` and on its scheduler's own, which computes
        the slots' numbers."""
        if self._device.type == "cpu":
            return []
        own = torch.get_device_module(self._device).current_stream(self._device)
        return [stream.record_event() for stream in (own, *streams) if stream is not None]

    @contextmanager
    def _on(self, stream: Any, *, after: Sequence[Any]) -> Iterator[None]:
        if stream is None:
            yield
            return
        with torch.get_device_module(self._device).stream(stream):
            for event in after:
                stream.wait_event(event)
            yield

    def _new_stream(self) -> Any:
        return None if self._device.type == "cpu" else torch.get_device_module(self._device).Stream(self._device)

    def _use_device(self) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).set_device(self._device)
