"""Exact prefix reuse for SGLang's pools of slots: what the connectors of generations A and B have in common."""

from __future__ import annotations

from typing import Any

import torch

from lmcache.cache_engine import LMCacheEngine
from lmcache.integration.guard import report_failure
from lmcache.integration.sglang.kv_requests import LoadMetadata, StoreMetadata
from lmcache.integration.sglang.tp_agreement import min_over_ranks
from lmcache.keys import Tokens
from lmcache.lease import PrefixLease


class PoolCache:
    """Loads and stores whole prompts, at once.

    A load is finished when :meth:`load` returns, also where SGLang offers to wait layer by layer: it starts a load
    when it matches a prompt, long before the forward, and until then it may evict the loaded slots and give them to
    another request without a word to us. A layer that was copied later would overwrite that request's KV.

    Every rank of ``tp_group`` must call :meth:`load` and :meth:`agree` in the same order. Neither raises, so that no
    rank is left waiting.
    """

    def __init__(self, engine: LMCacheEngine, *, device: torch.device, page_size: int, tp_group: Any) -> None:
        self.engine = engine
        self._device = device
        self._page_size = page_size
        self._tp_group = tp_group

    def load(self, request: LoadMetadata, lease: PrefixLease | None = None) -> int:
        """Fill the slots of ``request`` that are not −1, as far as every rank has their KV.

        Args:
            lease: of the engine's ``prefetch`` for this prompt; stays the caller's.

        Returns:
            The number of tokens from ``request.offset`` on that are in their slots now, those that were there before
            included; 0 when there is nothing new. It ends on a page, as SGLang frees the slots behind it.
        """
        resident = 0
        try:
            resident = max(request.offset, int((request.slot_mapping < 0).sum()))
            end = self._load(request, resident, lease)
        except Exception as error:
            report_failure(self.engine.metrics, "load_kv", error)
            end = 0
        end = self.agree(end)
        return end - request.offset if end > resident else 0

    def agree(self, num_tokens: int) -> int:
        """The smallest number of all ranks, rounded down to whole pages."""
        try:
            num_tokens = min_over_ranks(num_tokens, (self._tp_group,), self._device)
        except Exception as error:
            report_failure(self.engine.metrics, "tp_agreement", error)
            return 0
        return num_tokens // self._page_size * self._page_size

    def store(self, request: StoreMetadata) -> int:
        """Keep the KV of ``request``; its slots may be reused when this returns. Gives how many tokens are new.

        Raises:
            ValueError: there are not as many slots as tokens.
        """
        tokens, slots = request.token_ids, request.kv_indices.to(device="cpu", dtype=torch.int64)
        if len(slots) == len(tokens) - request.offset:
            slots = torch.nn.functional.pad(slots, (request.offset, 0), value=-1)
        mask = torch.arange(len(tokens)) >= request.offset if request.offset else None
        return self.engine.store(tokens, mask=mask, slot_mapping=slots)

    def _load(self, request: LoadMetadata, resident: int, lease: PrefixLease | None) -> int:
        count = min(len(request.token_ids), len(request.slot_mapping))
        tokens = request.token_ids[:count]
        if resident >= count or (lease is None and not self._has_chunk_at(tokens, resident)):
            return resident
        self._wait_for_forwards()
        found = self.engine.retrieve(
            tokens,
            mask=torch.arange(count) >= resident,
            slot_mapping=request.slot_mapping[:count].to(device="cpu", dtype=torch.int64),
            lease=lease,
        )
        return resident + int(found.sum())

    def _has_chunk_at(self, tokens: Tokens, position: int) -> bool:
        keys = self.engine.prefix_keys(tokens, paged=True)[position // self.engine.config.chunk_size :]
        return bool(self.engine.storage.find(keys[:1]))

    def _wait_for_forwards(self) -> None:
        """Overlapped scheduling frees the slots of a finished request while a last forward still writes to them, on a
        stream that nobody tells us."""
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
