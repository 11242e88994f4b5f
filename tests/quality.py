"""The questions by which a blend in an engine is held against the library's own, and what the library answers."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import torch

from lmcache.blend.correctors import make_corrector
from lmcache.blend.policies import make_policy
from lmcache.config import LMCacheEngineConfig
from lmcache.evaluation.blended import BlendedModel
from lmcache.evaluation.measures import token_agreement
from lmcache.evaluation.prompt_parts import PromptParts
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.evaluation.variants import Variant

TASKS, ANSWER_TOKENS, RATIO = 8, 24, 0.15
DEFAULTS = LMCacheEngineConfig.from_defaults()
POLICY, CORRECTOR = DEFAULTS.blend_policy, DEFAULTS.blend_corrector


def library(model_path: Path | str) -> tuple[list[PromptParts], list[float]]:
    """What ``lmcache evaluate`` measures: the prompts, and how far each answer agrees with full prefill."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    subject = BlendedModel(
        model,
        tokenizer,
        {POLICY: make_policy(POLICY)},
        {CORRECTOR: make_corrector(CORRECTOR)},
        answer_tokens=ANSWER_TOKENS,
    )
    variant = Variant(POLICY, CORRECTOR, RATIO, RATIO)
    prompts, agreements = [], []
    for task in generate_tasks(TASKS, seed=40):
        parts = subject.parts(task)
        full = subject.full_prefill(parts)
        with subject.blending(parts, [before(parts)] * len(parts.passage_ids)) as blend:
            (answer,) = blend([variant])
        prompts.append(parts)
        agreements.append(token_agreement(full.tokens, answer.tokens))
    return prompts, agreements


def before(parts: PromptParts) -> list[int]:
    """What a passage is cached behind: no prompt begins so, or its first passage would be an exact prefix."""
    return [*parts.system_ids, *parts.question_ids[:8]]


def segments(parts: PromptParts) -> list[dict[str, int]]:
    ends = list(accumulate((len(ids) for ids in parts.passage_ids), initial=len(parts.system_ids)))
    return [{"start": start, "end": end} for start, end in pairwise(ends)]


def until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
