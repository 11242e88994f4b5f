"""A transformers model as the subject of an evaluation: the one place that blends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final

import torch

from lmcache.blend.correctors import make_corrector
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.segment_store import SegmentStore
from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.evaluation.codec_trip import KeptKV, Trip
from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.prompt_parts import PromptParts, prompt_parts
from lmcache.evaluation.runs import Answer, BlendedAnswer
from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.variants import NO_CORRECTOR, Variant
from lmcache.integration.transformers import BlendedPrompt, CacheBlend, UnsupportedModelError, engine_metadata
from lmcache.integration.transformers.batched_cache import batched_cache
from lmcache.manager import LMCacheManager
from lmcache.storage.codecs.interface import Codec

_BATCH_BYTES: Final = 1 << 30
"""KV of prompts whose answers are generated together."""


class BlendedModel:
    """A :class:`lmcache.evaluation.runs.Subject`.

    ``policies``, ``correctors`` and ``codecs`` (None: nothing is packed) are those that variants name. Answers are
    greedy and at most ``answer_tokens`` long.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policies: Mapping[str, SelectionPolicy],
        correctors: Mapping[str, Corrector],
        *,
        answer_tokens: int,
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:
        metadata = engine_metadata(model, 1)
        self.num_layers = metadata.kv_shape[0]
        self.identity = f"{metadata.revision}-{metadata.model_config}"
        self._model = model
        self._tokenizer = tokenizer
        self._policies = policies
        self._correctors: Mapping[str, Corrector] = {NO_CORRECTOR: make_corrector(NO_CORRECTOR), **correctors}
        self._codecs: Mapping[str, Codec] = codecs or {}
        self._answer_tokens = answer_tokens
        stops = model.generation_config.eos_token_id
        self._stops = frozenset(stops if isinstance(stops, list) else [stops])

    def parts(self, task: Task) -> PromptParts:
        return prompt_parts(self._tokenizer, task)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    @torch.no_grad()
    def full_prefill(self, parts: PromptParts) -> Answer:
        input_ids = torch.tensor([parts.input_ids], device=self._model.device)
        start = time.perf_counter()
        logits = self._model(input_ids, logits_to_keep=1, use_cache=True).logits[0, -1].cpu()
        seconds = time.perf_counter() - start
        # Prefilled again by generate(): not every cache can be cut back to all tokens but the last.
        tokens = self._generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        return Answer(logits, tokens[0], seconds)

    @contextmanager
    def blending(
        self, parts: PromptParts, before: Sequence[Sequence[int]]
    ) -> Iterator[Callable[[Sequence[Variant]], Iterator[BlendedAnswer]]]:
        # Not from the environment: what a user keeps on disk is nothing that an evaluation may find.
        config = LMCacheEngineConfig.from_defaults()
        with (
            LMCacheManager(config, engine_metadata(self._model, config.chunk_size)) as manager,
            self._cache_blend(manager.engine) as blend,
        ):
            for passage, earlier in zip(parts.passage_ids, before, strict=True):
                if not blend.cache(list(passage), behind=list(earlier)):
                    raise EvaluationError(f"the KV of a passage of {len(passage)} tokens does not fit into host memory")
            if not self._codecs:
                yield lambda variants: self._blend(blend, parts, variants)
                return
            with ExitStack() as held:
                reused = [part for part in (parts.system_ids, *parts.passage_ids) if part]
                found = SegmentStore(manager.engine).get_many(list(map(list, dict.fromkeys(reused))))
                kept = [KeptKV(held.enter_context(segment)) for segment in found if segment is not None]
                yield lambda variants: self._blend_packed(blend, parts, kept, variants)

    def _blend_packed(
        self, blend: CacheBlend, parts: PromptParts, kept: Sequence[KeptKV], variants: Sequence[Variant]
    ) -> Iterator[BlendedAnswer]:
        for name, same in groupby(variants, key=lambda variant: variant.codec):
            trip = Trip()
            for passage in kept:
                passage.pass_through(self._codecs[name], trip)
            for answer in self._blend(blend, parts, list(same)):
                yield replace(answer, packed_ratio=trip.ratio, packed_error=trip.error)

    def _cache_blend(self, engine: LMCacheEngine) -> CacheBlend:
        try:
            return CacheBlend(self._model, engine=engine)
        except UnsupportedModelError as error:
            raise EvaluationError(str(error)) from error

    def _blend(self, blend: CacheBlend, parts: PromptParts, variants: Sequence[Variant]) -> Iterator[BlendedAnswer]:
        waiting: list[_Prefilled] = []
        for variant in variants:
            waiting.append(self._prefill(blend, parts, variant))
            if len(waiting) * waiting[0].kv_bytes >= _BATCH_BYTES:
                yield from self._answers(waiting)
                waiting = []
        yield from self._answers(waiting)

    def _prefill(self, blend: CacheBlend, parts: PromptParts, variant: Variant) -> _Prefilled:
        start = time.perf_counter()
        prompt = blend.prefill(
            parts.prompt,
            ratio=variant.ratio,
            policy=self._policies[variant.policy],
            corrector=self._correctors[variant.corrector],
        )
        logits = prompt.logits.cpu()
        seconds = time.perf_counter() - start
        found = sum(span.end - span.start for span in prompt.plan.spans)
        if prompt.report.fallback is None and found < sum(map(len, parts.passage_ids)):
            raise EvaluationError("passages that were cached are gone: they do not fit into host memory together")
        return _Prefilled(prompt, logits, seconds)

    def _answers(self, prefilled: Sequence[_Prefilled]) -> Iterator[BlendedAnswer]:
        if not prefilled:
            return
        inputs = [one.prompt.generate_inputs() for one in prefilled]
        tokens = self._generate(
            input_ids=torch.cat([one["input_ids"] for one in inputs]),
            attention_mask=torch.cat([one["attention_mask"] for one in inputs]),
            past_key_values=batched_cache([one["past_key_values"] for one in inputs], room=self._answer_tokens),
        )
        for one, answer in zip(prefilled, tokens, strict=True):
            report = one.prompt.report
            yield BlendedAnswer(one.logits, answer, one.seconds, report.charged_budget, report.fallback)

    def _generate(self, input_ids: torch.Tensor, **inputs: Any) -> list[tuple[int, ...]]:
        """The greedy tokens that follow each row, up to the one that ends the answer."""
        length = input_ids.shape[1]
        rows = self._model.generate(input_ids, **inputs, max_new_tokens=self._answer_tokens, do_sample=False)
        return [self._until_stop(row[length:].tolist()) for row in rows]

    def _until_stop(self, tokens: Sequence[int]) -> tuple[int, ...]:
        end = next((at + 1 for at, token in enumerate(tokens) if token in self._stops), len(tokens))
        return tuple(tokens[:end])


@dataclass(frozen=True)
class _Prefilled:
    prompt: BlendedPrompt
    logits: torch.Tensor
    seconds: float

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.prompt.keys, *self.prompt.values))
