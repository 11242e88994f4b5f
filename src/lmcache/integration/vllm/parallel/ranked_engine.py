"""``RankedEngine``: the engines of all ranks as one, for the scheduler role of a process that has none itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from lmcache.config import LMCacheEngineConfig
from lmcache.integration.vllm.parallel.messages import Answer, Clear, Describe, Description, LeaseState, LookUp
from lmcache.integration.vllm.parallel.ranked_lease import RankedLease
from lmcache.integration.vllm.parallel.ranks import Ranks
from lmcache.keys import CacheKey, Namespace, PrefixKey, Tokens, prefix_keys
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.storage.inquiry import Inquiry

CLEAR_SECONDS = 60.0


class RankedEngine:
    """What the scheduler role asks of an :class:`lmcache.cache_engine.LMCacheEngine`, asked of every rank.

    A prompt is hashed here, once: ranks differ in the namespace of their keys, not in their digests.
    """

    def __init__(self, ranks: Ranks, config: LMCacheEngineConfig, metadata: LMCacheEngineMetadata) -> None:
        """``metadata``: of any rank."""
        self._ranks = ranks
        self._config = config
        self._metadata = metadata
        self._lease_numbers = count()
        self._described: list[Description] = []
        self._described_in = -1

    def descriptions(self) -> list[Description]:
        """What the ranks say of themselves, asked once a connection; empty when not all can be reached and serve."""
        if self._described_in != self._ranks.connections or not self._ranks.connected:
            said = self._ranks.ask(Describe(), Description)
            if said is None or not all(rank.layout for rank in said):
                return []
            self._described, self._described_in = said, self._ranks.connections
        return self._described

    def namespace(self, *, lora: str = "", cache_salt: str = "", paged: bool) -> Namespace:
        """That of the first rank.

        Raises:
            ConnectionError: the ranks are not there.
        """
        described = self.descriptions()
        if not described:
            raise ConnectionError("the caches of the ranks cannot be reached")
        return self._metadata.namespace(
            described[0].layout, lora=lora, cache_salt=cache_salt, codec=self._config.inexact_codec
        )

    def prefix_keys(
        self, tokens: Tokens, *, lora: str = "", cache_salt: str = "", paged: bool = False
    ) -> list[PrefixKey]:
        namespace = self.namespace(lora=lora, cache_salt=cache_salt, paged=paged)
        return prefix_keys(namespace, tokens, self._config.chunk_size, include_partial=self._config.save_unfull_chunk)

    def ask(self, keys: Sequence[CacheKey]) -> Inquiry:
        """Over at once: the ranks ask the stores that they share with other servers in :meth:`prefetch`."""
        return Inquiry()

    def prefetch(
        self,
        tokens: Tokens,
        *,
        lora: str = "",
        cache_salt: str = "",
        paged: bool = False,
        keys: Sequence[PrefixKey],
    ) -> RankedLease:
        """Have every rank hold what it has. Waits for their answers, not for their disks."""
        name = f"prefix-{next(self._lease_numbers)}"
        digests = b"".join(key.digest for key in keys)
        states = self._ranks.ask(LookUp(name, len(tokens), digests, lora, cache_salt), LeaseState)
        return RankedLease(self._ranks, name, states)

    def clear(self) -> int:
        """How many entries went is not told.

        Raises:
            RuntimeError: a rank did not answer, and may still hold what it had.
        """
        if self._ranks.ask(Clear(), Answer, CLEAR_SECONDS) is None:
            raise RuntimeError("not every rank has forgotten what it held")
        return 0
