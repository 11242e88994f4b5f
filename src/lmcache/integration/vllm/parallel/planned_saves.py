"""What the scheduler role knows of saves that run in other processes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from lmcache.integration.vllm.connector_metadata import LMCacheConnectorMetadata
from lmcache.integration.vllm.parallel.messages import Answer, AreSaving
from lmcache.integration.vllm.parallel.ranks import Ranks
from lmcache.keys import PrefixKey

_REMEMBERED_KEYS = 4096


class PlannedSaves:
    """Stands for the :class:`lmcache.integration.vllm.pending_saves.PendingSaves` of all ranks.

    A request that finishes keeps its blocks if anything of it was ever saved: every rank is told (``delayed_frees`` of
    the next step) and names it when it is done, at once as a rule. To ask first would take longer.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._keys: OrderedDict[PrefixKey, None] = OrderedDict()
        self._requests: set[str] = set()
        self._delayed: list[str] = []

    def planned(self, meta: LMCacheConnectorMetadata, chunk_size: int) -> None:
        """Take note of what ``meta`` tells the ranks to save, and tell them whose blocks wait for them."""
        for save in meta.saves:
            self._requests.add(save.req_id)
            for key in save.keys[save.start // chunk_size :]:
                self._keys[key] = None
        for segments in meta.segment_saves:
            self._requests.add(segments.req_id)
        while len(self._keys) > _REMEMBERED_KEYS:
            self._keys.popitem(last=False)
        meta.delayed_frees, self._delayed = self._delayed, []

    def will_hold(self, key: PrefixKey) -> bool:
        """Whether a rank is saving ``key`` at this moment."""
        if key not in self._keys:
            return False
        answers = self._ranks.ask(AreSaving(bytes(key)), Answer)
        if answers is not None and any(answer.yes for answer in answers):
            return True
        del self._keys[key]
        return False

    def delay_free(self, req_id: str) -> bool:
        """Whether a finished request must keep its blocks until every rank has named it."""
        if req_id not in self._requests:
            return False
        self._requests.remove(req_id)
        self._delayed.append(req_id)
        return True

    def wait(self, req_ids: Iterable[str] | None = None) -> None:
        """Nothing: the ranks wait, when they are told to clear."""
