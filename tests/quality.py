"""The questions by which a blend in an engine is held against the library's own, and what the library answers."""

from __future__ import annotations

import json
import os
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from lmcache.blend.correctors import make_corrector
from lmcache.blend.policies import make_policy
from lmcache.config import LMCacheEngineConfig
from lmcache.evaluation.blended import BlendedModel
from lmcache.evaluation.measures import token_agreement
from lmcache.evaluation.prompt_parts import PromptParts, prompt_parts
from lmcache.evaluation.settings import code_digest
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.evaluation.variants import Variant
from lmcache.integration.model_identity import fingerprint
from tests.prepared_python import REPOSITORY

TASKS, ANSWER_TOKENS, RATIO = 8, 24, 0.15
_KEPT = REPOSITORY / ".cache" / "quality"
DEFAULTS = LMCacheEngineConfig.from_defaults()
POLICY, CORRECTOR = DEFAULTS.blend_policy, DEFAULTS.blend_corrector


def library(model_path: Path | str) -> tuple[list[PromptParts], list[float]]:
    """What ``lmcache evaluate`` measures: the prompts, and how far each answer agrees with full prefill.

    The tests of two engines ask for it; who comes second takes what the first one has computed with the same code.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = [prompt_parts(tokenizer, task) for task in generate_tasks(TASKS, seed=40)]
    kept = _KEPT / f"{_digest(Path(model_path), prompts)}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch = kept.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(_agreements(Path(model_path), tokenizer, prompts)))
        scratch.rename(kept)
    return prompts, json.loads(kept.read_text())


def _agreements(model_path: Path, tokenizer: Any, prompts: list[PromptParts]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    subject = BlendedModel(
        model,
        tokenizer,
        {POLICY: make_policy(POLICY)},
        {CORRECTOR: make_corrector(CORRECTOR)},
        answer_tokens=ANSWER_TOKENS,
    )
    variant = Variant(POLICY, CORRECTOR, RATIO, RATIO)
    agreements = []
    for parts in prompts:
        full = subject.full_prefill(parts)
        with subject.blending(parts, [before(parts)] * len(parts.passage_ids)) as blend:
            (answer,) = blend([variant])
        agreements.append(token_agreement(full.tokens, answer.tokens))
    return agreements


def _digest(model_path: Path, prompts: list[PromptParts]) -> str:
    """Of all that the library's answers come from, but for other packages: those of the first who asks are as good."""
    asked = json.dumps([parts.prompt for parts in prompts]).encode()
    digest = blake3(Path(__file__).read_bytes() + asked).hexdigest(8)
    return f"{fingerprint(model_path)}-{code_digest()}-{digest}"


def before(parts: PromptParts) -> list[int]:
    """What a passage is cached behind: no prompt begins so, or its first passage would be an exact prefix."""
    return [*parts.system_ids, *parts.question_ids[:8]]


def segments(parts: PromptParts) -> list[dict[str, int]]:
    ends = list(accumulate((len(ids) for ids in parts.passage_ids), initial=len(parts.system_ids)))
    return [{"start": start, "end": end} for start, end in pairwise(ends)]


def until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
