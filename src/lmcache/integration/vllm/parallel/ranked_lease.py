"""``RankedLease``: what all ranks hold of a prompt, as the scheduler sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lmcache.integration.vllm.parallel.messages import LeaseState, Look, Release
from lmcache.integration.vllm.parallel.ranks import Ranks


class RankedLease:
    """Stands for one lease in every rank, under the same name. As long as the shortest of them; see
    :class:`lmcache.lease.PrefixLease`, whose methods these are.

    What the ranks said last is remembered, so they are asked only while reads are under way.
    """

    def __init__(self, ranks: Ranks, name: str, states: Sequence[LeaseState] | None) -> None:
        """``states``: what the ranks answered to the look-up; None for nothing."""
        self.name = name
        self._ranks = ranks
        self._states: Sequence[LeaseState] = states or ()

    @property
    def num_tokens(self) -> int:
        return min((state.num_tokens for state in self._states), default=0)

    def tokens_by_tier(self, start: int = 0, end: int | None = None) -> dict[str, int]:
        """Those of the first rank: the others took theirs from the same tiers, but for evictions."""
        last = self.num_tokens if end is None else min(end, self.num_tokens)
        tokens: Counter[str] = Counter()
        begin = 0
        for tier, stop in self._states[0].tiers if self._states else ():
            tokens[tier] += max(0, min(stop, last) - max(begin, start))
            begin = stop
        return {tier: count for tier, count in tokens.items() if count}

    def ready(self) -> bool:
        if not self._all_ready():
            self._ask(cut=False)
        return self._all_ready()

    def cut(self) -> None:
        if not self._all_ready():
            self._ask(cut=True)

    def release(self) -> None:
        """Idempotent."""
        if self._states:
            self._states = ()
            self._ranks.tell(Release(self.name))

    def _all_ready(self) -> bool:
        return all(state.ready for state in self._states)

    def _ask(self, *, cut: bool) -> None:
        self._states = self._ranks.ask(Look(self.name, cut), LeaseState) or ()
