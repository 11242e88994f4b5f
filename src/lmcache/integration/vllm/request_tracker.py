"""What the scheduler role remembers of a request from its first look-up to its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcache.integration.vllm.blend.scheduling import RequestBlend
from lmcache.integration.vllm.model_identity import lora_identity, tenant_salt
from lmcache.integration.vllm.parallel.ranked_lease import RankedLease
from lmcache.integration.vllm.request_tokens import RequestTokens
from lmcache.keys import PrefixKey
from lmcache.lease import PrefixLease
from lmcache.storage.inquiry import Inquiry

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass
class RequestTracker:
    """``keys`` are those of the leading chunks hashed so far; ``saved_chunks`` of them were given to a save.

    ``local_tokens`` lie in vLLM's own prefix cache, ``external_tokens`` behind them come from ours. ``leased_for`` is
    the token count that ``lease`` was taken for: after a preemption the request has more, and is looked up again;
    ``asked_for`` is the one for which shared stores were asked, in ``inquiry``. ``sent_ahead`` is the lease of which
    bytes have set out. ``reused_tokens`` and ``tiers`` count the exact prefix, ``passage_tokens`` and
    ``passage_tiers`` what the blend behind it was promised.
    """

    request: Request
    lora: str
    cache_salt: str
    skip_load: bool
    skip_save: bool
    tokens: RequestTokens
    keys: list[PrefixKey] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    inquiry: Inquiry | None = None
    asked_for: int = -1
    lease: PrefixLease | RankedLease | None = None
    leased_for: int = 0
    sent_ahead: PrefixLease | RankedLease | None = None
    waiting_since: float | None = None
    local_tokens: int = 0
    external_tokens: int = 0
    saved_chunks: int = 0
    tail_saved: bool = False
    preemptions: int = 0
    reused_tokens: int = 0
    tiers: dict[str, int] = field(default_factory=dict)
    blend: RequestBlend | None = None
    blend_report: dict[str, Any] | None = None
    passage_tokens: int = 0
    passage_tiers: dict[str, int] = field(default_factory=dict)
    segments_saved: bool = False

    @classmethod
    def of(cls, request: Request) -> RequestTracker:
        params: dict[str, Any] = request.kv_transfer_params or {}
        # Prompts given as embeddings have placeholder token ids: nothing to tell two of them apart by.
        opaque = getattr(request, "prompt_embeds", None) is not None
        return cls(
            request=request,
            lora=lora_identity(request.lora_request),
            cache_salt=tenant_salt(request),
            skip_load=opaque or bool(params.get("lmcache.skip_load", False)),
            skip_save=opaque or bool(params.get("lmcache.skip_save", False)),
            tokens=RequestTokens(request),
            preemptions=request.num_preemptions,
        )

    @property
    def blends(self) -> bool:
        """Whether what was promised is a blend."""
        return self.blend is not None and self.blend.prepared is not None

    @property
    def exact_tokens(self) -> int | None:
        """Leading tokens whose KV is exact; None: all."""
        return None if self.blend is None else self.blend.exact_tokens

    def take_lease(self) -> PrefixLease | RankedLease | None:
        lease, self.lease, self.sent_ahead = self.lease, None, None
        return lease

    def drop_lease(self) -> None:
        if (lease := self.take_lease()) is not None:
            lease.release()
        if self.blend is not None:
            self.blend.release()

    def was_preempted(self) -> bool:
        """Whether vLLM took the request's blocks away since the last call."""
        before, self.preemptions = self.preemptions, self.request.num_preemptions
        return self.preemptions != before

    def summary(self, milliseconds: dict[str, float]) -> dict[str, Any]:
        """What the client is told in ``kv_transfer_params`` of the response; ``milliseconds`` that it lost to us."""
        blend = self.blend_report
        kept = blend is None or blend["fallback"] is None
        tiers = dict(Counter(self.tiers) + Counter(self.passage_tiers if kept else {}))
        if blend is None and self.blend is not None and self.blend.fallback is not None:
            blend = {"fallback": self.blend.fallback}
        return {
            "lmcache": {
                "prompt_tokens": self.request.num_prompt_tokens,
                "reused_tokens": self.reused_tokens + (self.passage_tokens if kept else 0),
                "tier": "+".join(tiers) or None,
                "tokens_by_tier": tiers,
                "milliseconds": milliseconds,
                "blend": blend,
            }
        }
