"""``CacheBlend``: keep the KV of passages, and build prompts from them, with a plain transformers model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch

from lmcache.blend.batch import BlendPrompt
from lmcache.blend.blend_pass import BlendResult, blend
from lmcache.blend.correctors import make_corrector
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.from_config import make_corrector_from_config, make_policy_from_config, recompute_ratio
from lmcache.blend.plan import BlendPlan, ReusedSpan
from lmcache.blend.policies import make_policy
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.segment_store import SegmentStore, StoredSegment
from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.transformers.blended_prompt import BlendedPrompt, BlendReport
from lmcache.integration.transformers.host import TransformersHost, TransformersModel
from lmcache.integration.transformers.model_identity import engine_metadata
from lmcache.integration.transformers.supported import supported_ropes
from lmcache.integration.transformers.trial import try_out
from lmcache.keys import Tokens
from lmcache.manager import LMCacheManager


class CacheBlend:
    """CacheBlend for one model: passages are computed once, and reused wherever they stand in later prompts.

    The model's attention is replaced only while a call of this object runs; between calls it is untouched. Threads may
    share this object, but the model must not run by itself in another thread during a call (it says so), nor its
    weights change while this object is in use. A context manager that closes.

    Args:
        model: a transformers causal language model in eval mode.
        policy: which tokens of reused passages are computed afresh; a name or an object. None: as ``config`` says
            (``blend_policy``); likewise ``corrector``, how the others follow (``blend_corrector``).
        ratio: the share of reused tokens that the policy may choose, 0 … 1; None: the last of
            ``blend_recompute_ratios``.
        engine: where KV is kept; built for the model by ``LMCacheManager`` with :func:`engine_metadata`, and stays the
            caller's to close. None: one is built, and closed with this object.
        config: for what is not given, and of the engine that is built. None: that of ``engine``, or else
            ``LMCacheEngineConfig.from_env()``.
        cache_salt: objects with other salts share no passages.

    Raises:
        UnsupportedModelError: the model cannot be blended (a ValueError).
        ValueError: no such policy, corrector or ratio, or the engine is another model's.
    """

    def __init__(
        self,
        model: Any,
        *,
        policy: str | SelectionPolicy | None = None,
        corrector: str | Corrector | None = None,
        ratio: float | None = None,
        engine: LMCacheEngine | None = None,
        config: LMCacheEngineConfig | None = None,
        cache_salt: str = "",
    ) -> None:
        if config is None:
            config = LMCacheEngineConfig.from_env() if engine is None else engine.config
        ratio = recompute_ratio(config) if ratio is None else ratio
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio={ratio}: the recompute ratio must be 0 … 1")
        self._ropes = supported_ropes(model)
        self._model = TransformersModel(model)
        self._policy = make_policy_from_config(config) if policy is None else _policy(policy)
        self._corrector = make_corrector_from_config(config) if corrector is None else _corrector(corrector)
        self._ratio = ratio
        try_out(self._model, self._ropes)
        if engine is None:
            manager = LMCacheManager(config, engine_metadata(model, config.chunk_size))
            engine, close = manager.engine, manager.close
        else:
            _check_engine(engine, model)
            close = _nothing
        self._closing = weakref.finalize(self, close)
        self._store = SegmentStore(engine, cache_salt=cache_salt)

    def cache(self, passage: Tokens, *, behind: Tokens = ()) -> bool:
        """Compute and keep the KV of ``passage`` as it is behind ``behind``, which is kept as a passage of its own.

        Behind the system prompt that it will be used with, a passage blends better than alone. A passage that is kept
        already is not computed again, whatever stood before it then.

        Returns:
            Whether it is kept now; False when there is no room.
        """
        tokens, before = self._tokens(passage), self._tokens(behind)
        if not len(tokens):
            raise ValueError("a passage has at least one token")
        if len(before):
            self.cache(before)
        if self._store.contains(tokens):
            return True
        prompt = torch.cat([before, tokens])
        with _held(self._store, [before] if len(before) else []) as found:
            exact = [held for held in found if held is not None and self._is_exact(held, before[:0], len(prompt))]
            spans = tuple(ReusedSpan(0, len(before), source, exact=True) for source in range(len(exact)))
            planned = BlendPrompt(BlendPlan(len(prompt), spans), exact)
            result = self._blend([prompt], [planned], self._policy, self._corrector)
        start = len(before)
        return self._store.put(
            tokens, [k[start:] for k in result.keys], [v[start:] for v in result.values], before=before
        )

    def prefill(
        self,
        parts: Sequence[Tokens],
        *,
        ratio: float | None = None,
        policy: str | SelectionPolicy | None = None,
        corrector: str | Corrector | None = None,
    ) -> BlendedPrompt:
        """KV and logits of a prompt: parts that are kept are reused, others are computed.

        Args:
            parts: token ids, one after the other the prompt. Each is looked up as it is, so cut them as they were cut
                when they were cached. The last token is computed in any case.
            ratio: in place of the constructor's; likewise ``policy`` and ``corrector``.
        """
        return self.prefill_many([parts], ratio=ratio, policy=policy, corrector=corrector)[0]

    def prefill_many(
        self,
        prompts: Sequence[Sequence[Tokens]],
        *,
        ratio: float | None = None,
        policy: str | SelectionPolicy | None = None,
        corrector: str | Corrector | None = None,
    ) -> list[BlendedPrompt]:
        """:meth:`prefill` of several prompts in one pass of the model."""
        if len(prompts) > 1 and self._depends_on_length:
            # transformers takes the longest prompt of a forward for the length of all.
            return [self.prefill(parts, ratio=ratio, policy=policy, corrector=corrector) for parts in prompts]
        chosen_policy = self._policy if policy is None else _policy(policy)
        chosen_corrector = self._corrector if corrector is None else _corrector(corrector)
        cut = [[tokens for part in parts if len(tokens := self._tokens(part))] for parts in prompts]
        if not all(cut):
            raise ValueError("a prompt has at least one token")
        ids = [torch.cat(parts) for parts in cut]
        with _held(self._store, [part for parts in cut for part in parts]) as found:
            held = iter(found)
            planned = [
                self._plan(whole, parts, [next(held) for _ in parts], self._ratio if ratio is None else ratio)
                for whole, parts in zip(ids, cut, strict=True)
            ]
            result = self._blend(ids, planned, chosen_policy, chosen_corrector)
        return self._split(ids, result)

    def close(self) -> None:
        """Close the engine if it was built here. Idempotent."""
        self._closing()

    def __enter__(self) -> CacheBlend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _depends_on_length(self) -> bool:
        return any(rope is not None and rope.depends_on_length for rope in self._ropes)

    def _plan(
        self, prompt: torch.Tensor, parts: Sequence[torch.Tensor], found: Sequence[StoredSegment | None], ratio: float
    ) -> BlendPrompt:
        spans: list[ReusedSpan] = []
        sources: list[StoredSegment] = []
        start = 0
        exact = True  # so far
        for part, segment in zip(parts, found, strict=True):
            exact = exact and segment is not None and self._is_exact(segment, prompt[:start], len(prompt))
            if segment is not None:
                end = start + len(part)
                spans.append(ReusedSpan(start, end, len(sources), old_start=segment.start, exact=exact))
                sources.append(segment)
            start += len(part)
        return BlendPrompt(BlendPlan(len(prompt), tuple(spans)), sources, ratio)

    def _is_exact(self, segment: StoredSegment, before: torch.Tensor, length: int) -> bool:
        """Whether its KV is what the model would compute behind ``before``, in a prompt of ``length`` tokens."""
        same_frequencies = all(
            rope is None or rope.frequencies(segment.length) is rope.frequencies(length) for rope in self._ropes
        )
        return same_frequencies and segment.follows(before)

    def _blend(
        self,
        ids: Sequence[torch.Tensor],
        prompts: Sequence[BlendPrompt],
        policy: SelectionPolicy,
        corrector: Corrector,
    ) -> BlendResult[torch.Tensor]:
        return blend(TransformersHost(self._model, ids), prompts, self._ropes, policy, corrector)

    def _split(self, ids: Sequence[torch.Tensor], result: BlendResult[torch.Tensor]) -> list[BlendedPrompt]:
        lengths = [len(prompt) for prompt in ids]
        keys = [torch.split(layer, lengths) for layer in result.keys]
        values = [torch.split(layer, lengths) for layer in result.values]
        assert result.output is not None  # of a blend that is not of KV alone
        device = result.output.device
        return [
            BlendedPrompt(
                input_ids=prompt[None].to(device),
                logits=result.output[index],
                keys=[layer[index] for layer in keys],
                values=[layer[index] for layer in values],
                plan=result.plans[index],
                report=BlendReport(result.charged_budgets[index], dict(result.seconds), result.fallbacks[index]),
                config=self._model.model.config,
            )
            for index, prompt in enumerate(ids)
        ]

    def _tokens(self, part: Tokens) -> torch.Tensor:
        """int64 ``[n]`` on the CPU."""
        if not self._closing.alive:
            raise RuntimeError("this CacheBlend is closed")
        tokens = torch.as_tensor(part, device="cpu")
        if not len(part):
            return tokens.to(torch.int64)
        if tokens.dim() != 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"token ids must be a row of integers, got {tokens.dtype} of shape {list(tokens.shape)}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._model.vocab_size:
            raise ValueError(f"token ids {low} … {high}: the model knows 0 … {self._model.vocab_size - 1}")
        return tokens.to(torch.int64)


@contextmanager
def _held(store: SegmentStore, passages: Sequence[torch.Tensor]) -> Iterator[list[StoredSegment | None]]:
    """Those of ``passages`` that are kept, None for the others; for the time of a blend."""
    with ExitStack() as held:
        found = store.get_many(passages)
        for segment in found:
            if segment is not None:
                held.enter_context(segment)
        yield found


def _policy(given: str | SelectionPolicy) -> SelectionPolicy:
    return make_policy(given) if isinstance(given, str) else given


def _corrector(given: str | Corrector) -> Corrector:
    return make_corrector(given) if isinstance(given, str) else given


def _check_engine(engine: LMCacheEngine, model: Any) -> None:
    if engine.metadata.namespace() != engine_metadata(model, engine.config.chunk_size).namespace():
        raise ValueError(
            f"the engine was built for {engine.metadata.model_name!r} with other weights, settings or dtype: give it "
            "lmcache.integration.transformers.engine_metadata(model, config.chunk_size)"
        )


def _nothing() -> None:
    """The engine is the caller's."""
