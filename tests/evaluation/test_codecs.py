"""What a codec costs: the reused KV goes through it before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import pytest
import torch

pytest.importorskip("transformers")

from lmcache.blend.policies import make_policy
from lmcache.evaluation.blended import BlendedModel
from lmcache.evaluation.earlier_prompt import Context
from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.measures import kl_divergence
from lmcache.evaluation.plan import Plan
from lmcache.evaluation.runs import BlendedAnswer, make_prompts
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.evaluation.tasks.world import Size
from lmcache.evaluation.variants import Variant, sweep
from lmcache.integration.transformers.loading import load_model
from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.codecs.fp8 import Fp8Codec
from lmcache.storage.codecs.raw import RawCodec
from tests.evaluation.tiny_model import save_tiny_model

TASKS = generate_tasks(3, size=Size(num_passages=3, passage_words=40))
SMOLLM2 = Path(".cache/models/smollm2-bfloat16")
CODECS = ("raw", "fp8", "corrupting")


class CorruptingCodec(Fp8Codec):
    """The negative control: values come back with the wrong sign."""

    name: ClassVar[str] = "corrupting"

    def decode(self, packed: memoryview, tensor: torch.Tensor, spec: KVSpec) -> None:
        super().decode(packed, tensor, spec)
        tensor[:, 1].neg_()


def subject_of(folder: Path, dtype: str = "float32") -> BlendedModel:
    model, tokenizer = load_model(folder, dtype)
    codecs = {"raw": RawCodec(), "fp8": Fp8Codec(), "corrupting": CorruptingCodec()}
    return BlendedModel(model, tokenizer, {"none": make_policy("none")}, {}, answer_tokens=8, codecs=codecs)


def variants(codecs: Sequence[str]) -> list[Variant]:
    return [Variant("none", "none", 0.0, 0.0, codec) for codec in codecs]


def divergences(subject: BlendedModel, context: Context) -> tuple[dict[str, float], dict[str, BlendedAnswer]]:
    """Mean KL of each codec over all tasks, and its answers to the last one."""
    kl: dict[str, list[float]] = {codec: [] for codec in CODECS}
    answers: dict[str, BlendedAnswer] = {}
    for prompt in make_prompts(subject, TASKS, context):
        reference = subject.full_prefill(prompt.parts)
        with subject.blending(prompt.parts, prompt.before) as blend:
            answers = dict(zip(CODECS, blend(variants(CODECS)), strict=True))
        for codec, answer in answers.items():
            kl[codec].append(kl_divergence(reference.logits, answer.logits))
    return {codec: fmean(values) for codec, values in kl.items()}, answers


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> BlendedModel:
    return subject_of(save_tiny_model(tmp_path_factory.mktemp("model")))


def test_a_prefix_is_exact_as_long_as_its_codec_is(subject: BlendedModel) -> None:
    kl, answers = divergences(subject, "prefix")
    assert kl["raw"] < 1e-6 < kl["fp8"] < kl["corrupting"]
    assert (answers["raw"].packed_ratio, answers["raw"].packed_error) == (1, 0)
    assert answers["fp8"].packed_ratio == pytest.approx(4 / (1 + 4 / 128), rel=0.01)
    assert 0.01 < answers["fp8"].packed_error < 0.04
    assert answers["corrupting"].packed_error > 0.3


def test_codecs_do_not_see_what_another_left(subject: BlendedModel) -> None:
    prompt = make_prompts(subject, TASKS, "system")[0]
    with subject.blending(prompt.parts, prompt.before) as blend:
        before, _, after = blend(variants(["raw", "corrupting", "raw"]))
    assert torch.equal(before.logits, after.logits)


def test_what_computes_everything_is_run_once() -> None:
    found, _ = sweep({name: make_policy(name) for name in ("none", "full")}, ["none"], [], 4, ["raw", "fp8"])
    assert [str(variant) for variant in found] == ["none", "full", "none, fp8"]


def test_a_codec_that_is_not_there_is_named() -> None:
    with pytest.raises(EvaluationError, match="--codec: no codec 'zip': must be one of raw, zstd, fp8, delta"):
        Plan.parse(
            model=Path(),
            num_tasks=1,
            tasks_file=None,
            policies=None,
            correctors=None,
            budgets="0.15",
            context="prefix",
            dtype="float32",
            device="cpu",
            seed=0,
            threads=None,
            codecs="raw,zip",
        )


@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="the model is not there: make setup")
def test_on_a_real_model_fp8_is_close_and_corruption_is_seen() -> None:
    kl, answers = divergences(subject_of(SMOLLM2), "prefix")
    assert kl["raw"] < 1e-4
    assert kl["fp8"] < 0.05
    assert kl["corrupting"] > 10 * kl["fp8"]
    assert kl["corrupting"] > 0.5
    assert answers["fp8"].packed_error < 0.04
