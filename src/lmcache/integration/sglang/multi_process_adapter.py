"""What SGLang 0.5.13 to 0.5.20 looks for by default: a look-up when a request is matched, a load when it is scheduled.

The name speaks of a daemon in another process. Here everything happens in SGLang's own; no daemon is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmcache.integration.guard import never_raise, report_failure
from lmcache.integration.sglang.attached_cache import AttachedCache
from lmcache.integration.sglang.kv_requests import LoadMetadata, StoreMetadata
from lmcache.integration.sglang.lookup_leases import LookupLeases
from lmcache.integration.sglang.utils import last_config_file
from lmcache.keys import Tokens

LOOKUP_SECONDS = 60.0
"""How long what was looked up is held for a request that stays queued. One that waits longer is looked up again."""


class LMCacheMPConnector(AttachedCache):
    """No method raises; the constructor does, on a configuration that is wrong. For the scheduler's thread."""

    def __init__(
        self,
        sgl_config: Any,
        tp_size: int,
        rank: int,
        k_pool: Sequence[torch.Tensor],
        v_pool: Sequence[torch.Tensor],
        page_size: int,
        host: str | None = None,
        port: int | None = None,
        tp_group: Any = None,
        config_file: str | None = None,
        lookup_seconds: float = LOOKUP_SECONDS,
        **_later: Any,
    ) -> None:
        """Args:
        sgl_config: SGLang's ``ModelConfig``.
        rank: in the tensor-parallel group.
        k_pool, v_pool: one tensor a layer, ``[slots, heads, dim]``.
        page_size: tokens in a page of the pool.
        host, port: of the daemon; not used.
        tp_group: torch ``ProcessGroup`` or SGLang's ``GroupCoordinator``; None for one rank.
        config_file: YAML file; by default the one that :func:`lmcache_get_config` read last, which is the one that
            ``--lmcache-config-file`` names.
        lookup_seconds: how long a look-up is held for a request that is not scheduled.
        _later: what later versions of SGLang may add.

        Raises:
            ValueError: the configuration is wrong; the message names the key, the value and where it came from.
        """
        super().__init__(
            sgl_config,
            tp_size,
            rank,
            k_pool,
            v_pool,
            tp_group=tp_group,
            page_size=page_size,
            config_file=config_file or last_config_file(),
        )
        self._leases = LookupLeases(lookup_seconds)

    @never_raise(lambda: 0)
    def lookup_kv(self, token_ids: Tokens, request_id: str) -> int:
        """How many leading tokens every rank has, in whole pages. They are held for this request, and read into memory
        where they are not."""
        if self._cache is None:
            return 0
        return self._cache.agree(self._look_up(token_ids, request_id))

    @never_raise(lambda: 0)
    def retrieve_kv(self, load_metadata: LoadMetadata) -> int:
        """Fill the slots that are not −1, as far as their KV is held; ends the holding.

        Returns:
            The number of tokens from ``offset`` on that are in their slots now, those with slot −1 included; 0 when
            there is nothing new.
        """
        if self._cache is None:
            return 0
        lease = self._leases.take(load_metadata.request_id or "")
        try:
            return self._cache.load(load_metadata, lease)
        finally:
            if lease is not None:
                lease.release()

    @never_raise(lambda: None)
    def store_kv(self, store_metadata: StoreMetadata) -> None:
        """Keep the KV of a request; its slots may be reused when this returns."""
        self._leases.release_old()
        if self._cache is not None:
            self._cache.store(store_metadata)

    @never_raise(lambda: None)
    def release_pending(self, request_id: str) -> None:
        """Let go of what :meth:`lookup_kv` holds for this request. Idempotent."""
        self._leases.release(request_id)

    @never_raise(lambda: None)
    def end_session(self, request_id: str) -> None:
        """The request is over. Idempotent."""
        self._leases.release(request_id)

    @never_raise(lambda: None)
    def close(self) -> None:
        self._leases.release_all()
        super().close()

    def _look_up(self, token_ids: Tokens, request_id: str) -> int:
        """Not raising: the other ranks wait to agree on a number."""
        assert self._cache is not None
        try:
            lease = self._cache.engine.prefetch(token_ids, paged=True, ask_stores=True)
            self._leases.hold(request_id, lease)
            return min(lease.num_tokens, len(token_ids))
        except Exception as error:
            report_failure(self.metrics, "lookup_kv", error)
            return 0
