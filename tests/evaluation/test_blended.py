from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from lmcache.blend.correctors import make_corrector
from lmcache.blend.policies import make_policy
from lmcache.evaluation import blended
from lmcache.evaluation.blended import BlendedModel
from lmcache.evaluation.earlier_prompt import Context
from lmcache.evaluation.measures import kl_divergence
from lmcache.evaluation.prompt_parts import PromptParts
from lmcache.evaluation.runs import BlendedAnswer, make_prompts
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.evaluation.tasks.world import Size
from lmcache.evaluation.variants import Variant
from lmcache.integration.transformers.loading import load_model
from tests.evaluation.tiny_model import save_tiny_model

TASKS = generate_tasks(2, size=Size(num_passages=3, passage_words=40))
NONE, FULL = Variant("none", "none", 0.0, 0.0), Variant("full", "none", 1.0, 1.0)
RANDOM, SHIFTED = (Variant("random", corrector, 0.3, 0.3) for corrector in ("none", "key_shift"))
ALL = [NONE, RANDOM, SHIFTED, FULL]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> BlendedModel:
    model, tokenizer = load_model(save_tiny_model(tmp_path_factory.mktemp("model")))
    policies = {name: make_policy(name) for name in ("none", "random", "full")}
    return BlendedModel(model, tokenizer, policies, {"key_shift": make_corrector("key_shift")}, answer_tokens=8)


def answers(
    subject: BlendedModel, context: Context, variants: Sequence[Variant]
) -> tuple[PromptParts, list[BlendedAnswer]]:
    prompt = make_prompts(subject, TASKS, context)[1]
    with subject.blending(prompt.parts, prompt.before) as blend:
        return prompt.parts, list(blend(variants))


@pytest.mark.parametrize("context", ["alone", "system", "prompt"])
def test_all_budget_is_a_full_prefill_and_less_is_worse(subject: BlendedModel, context: Context) -> None:
    parts, (none, random, shifted, full) = answers(subject, context, ALL)
    reference = subject.full_prefill(parts)
    divergences = [kl_divergence(reference.logits, answer.logits) for answer in (none, random, full)]
    assert divergences[2] < 1e-6 < divergences[1]
    assert divergences[2] < 1e-6 < divergences[0]
    assert (full.tokens, full.fallback) == (reference.tokens, None)
    assert 0 < len(reference.tokens) <= 8
    assert (none.charged_budget, full.charged_budget) == (0, 1)
    assert random.charged_budget == pytest.approx(0.3, abs=0.01)
    assert kl_divergence(random.logits, shifted.logits) > 0
    assert reference.seconds > 0


def test_answers_do_not_depend_on_what_they_are_generated_with(
    subject: BlendedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, together = answers(subject, "alone", ALL)
    monkeypatch.setattr(blended, "_BATCH_BYTES", 1)
    _, apart = answers(subject, "alone", ALL)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in apart]


def test_an_answer_ends_with_the_token_that_ends_it(subject: BlendedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (long,) = answers(subject, "alone", [NONE])
    assert len(long.tokens) == 8
    # What it says fourth, as the end: rows that end earlier than others are filled up by transformers.
    stop = long.tokens[3]
    monkeypatch.setattr(subject._model.generation_config, "eos_token_id", stop)
    monkeypatch.setattr(subject._model.generation_config, "pad_token_id", stop)
    monkeypatch.setattr(subject, "_stops", frozenset({stop}))
    _, (short, *_) = answers(subject, "alone", ALL)
    assert short.tokens == long.tokens[: long.tokens.index(stop) + 1]


def test_models_are_told_apart(subject: BlendedModel, tmp_path: Path) -> None:
    model, tokenizer = load_model(save_tiny_model(tmp_path))
    assert BlendedModel(model, tokenizer, {}, {}, answer_tokens=8).identity == subject.identity
    next(model.parameters()).data.add_(1)
    assert BlendedModel(model, tokenizer, {}, {}, answer_tokens=8).identity != subject.identity
