"""``CacheBlend``: what is kept, what is reused exactly, what is told, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lmcache.blend.kv_source import KVLoadError
from lmcache.blend.plan import Reason
from lmcache.blend.segment_store import StoredSegment
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.transformers import BlendedPrompt, CacheBlend, engine_metadata
from lmcache.manager import LMCacheManager
from tests.transformers.small_models import (
    CONFIGS,
    VOCAB,
    continuation,
    own_continuation,
    own_prefill,
    random_ids,
    small_model,
)

SYSTEM, DOC_A, DOC_B, QUESTION = (random_ids(count, seed) for seed, count in enumerate((7, 18, 15, 9)))
PROMPT = [SYSTEM, DOC_B, DOC_A, QUESTION]
IDS = torch.cat(PROMPT)
MODEL = small_model("llama")


@pytest.fixture
def blend() -> Iterator[CacheBlend]:
    with CacheBlend(MODEL) as it:
        yield it


def fates(result: BlendedPrompt) -> list[tuple[int, Reason]]:
    """Length and fate of each range of tokens."""
    return [(part.end - part.start, part.reason) for part in result.plan.ranges()]


def test_a_system_prompt_and_the_passage_that_was_cached_behind_it_are_exact(blend: CacheBlend) -> None:
    blend.cache(DOC_A, behind=SYSTEM)
    result = blend.prefill([SYSTEM, DOC_A, QUESTION])
    assert fates(result) == [(7, Reason.EXACT), (18, Reason.EXACT), (9, Reason.NOT_CACHED)]
    expected = own_prefill(MODEL, torch.cat([SYSTEM, DOC_A, QUESTION]))
    torch.testing.assert_close(result.logits, expected.logits, atol=1e-5, rtol=0)
    assert result.report.charged_budget == 0


def test_a_passage_that_stands_elsewhere_is_moved_and_what_is_behind_it_is_not_exact(blend: CacheBlend) -> None:
    blend.cache(DOC_A, behind=SYSTEM)
    blend.cache(DOC_B, behind=torch.cat([SYSTEM, DOC_A]))
    result = blend.prefill([SYSTEM, QUESTION, DOC_A, DOC_B], policy="none")
    assert fates(result) == [
        (7, Reason.EXACT),
        (9, Reason.NOT_CACHED),
        (18, Reason.MOVED),
        (14, Reason.MOVED),
        (1, Reason.SUFFIX),
    ]


def test_a_passage_cached_alone_is_exact_at_the_start_only(blend: CacheBlend) -> None:
    blend.cache(DOC_A)
    assert fates(blend.prefill([DOC_A, QUESTION]))[0] == (18, Reason.EXACT)
    assert fates(blend.prefill([SYSTEM, DOC_A, QUESTION], policy="none"))[1] == (18, Reason.MOVED)


def test_a_long_context_is_a_passage_of_its_own(blend: CacheBlend) -> None:
    """A passage may be cached in the context of an earlier prompt; the context as a whole is then kept too."""
    context = torch.cat([SYSTEM, DOC_B])
    blend.cache(DOC_A, behind=context)
    assert [fate for _, fate in fates(blend.prefill([context, DOC_A, QUESTION]))][:2] == [Reason.EXACT] * 2
    expected = own_prefill(MODEL, torch.cat([context, DOC_A, QUESTION])).logits
    torch.testing.assert_close(blend.prefill([context, DOC_A, QUESTION]).logits, expected, atol=1e-5, rtol=0)


def test_what_is_kept_is_not_computed_again(blend: CacheBlend) -> None:
    blend.cache(DOC_A, behind=SYSTEM)
    forwards: list[int] = []
    handle = MODEL.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        assert blend.cache(DOC_A, behind=SYSTEM)
        assert blend.cache(SYSTEM)
        assert not forwards
        blend.cache(DOC_B, behind=SYSTEM)
        assert len(forwards) == 1
    finally:
        handle.remove()


def test_kept_kv_is_that_of_the_model(blend: CacheBlend) -> None:
    blend.cache(DOC_A, behind=SYSTEM)
    expected = own_prefill(MODEL, torch.cat([SYSTEM, DOC_A]))
    result = blend.prefill([SYSTEM, DOC_A])
    for layer in range(len(expected.keys)):
        torch.testing.assert_close(result.keys[layer], expected.keys[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.values[layer], expected.values[layer], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 1.0])
def test_the_ratio_is_spent(blend: CacheBlend, ratio: float) -> None:
    blend.cache(DOC_A, behind=SYSTEM)
    blend.cache(DOC_B)
    result = blend.prefill(PROMPT, ratio=ratio, policy="query_attention")
    selected = sum(count for count, fate in fates(result) if fate is Reason.SELECTED)
    assert selected == int(33 * ratio + 0.5)
    assert result.report.charged_budget == pytest.approx(selected / 33)
    assert result.plan.policy == "query_attention"


def test_more_recompute_comes_nearer(blend: CacheBlend) -> None:
    blend.cache(DOC_A)
    blend.cache(DOC_B)
    expected = own_prefill(MODEL, IDS).logits
    errors = [float((blend.prefill(PROMPT, ratio=ratio).logits - expected).norm()) for ratio in (0.0, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_several_prompts_in_one_pass_are_what_each_is_alone(blend: CacheBlend) -> None:
    blend.cache(DOC_A, behind=SYSTEM)
    blend.cache(DOC_B, behind=SYSTEM)
    prompts = [PROMPT, [SYSTEM, DOC_A, QUESTION], [QUESTION], [DOC_B, DOC_B, DOC_A[:1]]]
    alone = [blend.prefill(parts) for parts in prompts]
    forwards: list[int] = []
    handle = MODEL.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        together = blend.prefill_many(prompts)
    finally:
        handle.remove()
    assert len(forwards) == 2  # one that looks, one that computes
    for one, other in zip(together, alone, strict=True):
        assert one.plan == other.plan
        assert torch.equal(one.input_ids, other.input_ids)
        assert one.report.charged_budget == other.report.charged_budget
        torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=0)
        assert torch.equal(continuation(MODEL, one, 8), continuation(MODEL, other, 8))


def test_prompts_of_several_lengths_where_the_length_decides_on_frequencies() -> None:
    model = small_model("phi3-longrope")  # which has other frequencies beyond 40 tokens
    with CacheBlend(model) as blend:
        blend.cache(DOC_A)
        short, long = blend.prefill_many([[DOC_A, QUESTION], PROMPT], ratio=1.0)
        assert fates(short)[0] == (18, Reason.EXACT)
    torch.testing.assert_close(short.logits, own_prefill(model, torch.cat([DOC_A, QUESTION])).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(long.logits, own_prefill(model, IDS).logits, atol=1e-4, rtol=0)


def test_each_generation_takes_a_cache_of_its_own(blend: CacheBlend) -> None:
    result = blend.prefill(PROMPT)
    expected = own_continuation(MODEL, IDS, 16)
    assert torch.equal(continuation(MODEL, result, 16), expected)
    assert torch.equal(continuation(MODEL, result, 16), expected)
    assert result.past_key_values.get_seq_length() == len(IDS) - 1
    assert int(result.logits.argmax()) == int(expected[0])


def test_pad_tokens_in_the_prompt_count(blend: CacheBlend) -> None:
    """Left to itself, ``generate`` takes them for padding."""
    ids = torch.cat([DOC_A, torch.tensor([MODEL.config.pad_token_id]), QUESTION])
    assert torch.equal(continuation(MODEL, blend.prefill([ids]), 8), own_continuation(MODEL, ids, 8))


def test_a_prompt_of_one_token(blend: CacheBlend) -> None:
    result = blend.prefill([[5]])
    torch.testing.assert_close(result.logits, own_prefill(MODEL, torch.tensor([5])).logits, atol=1e-5, rtol=0)
    assert torch.equal(continuation(MODEL, result, 8), own_continuation(MODEL, torch.tensor([5]), 8))


def test_lists_arrays_and_empty_parts(blend: CacheBlend) -> None:
    blend.cache(DOC_A.tolist(), behind=np.asarray(SYSTEM))
    result = blend.prefill([SYSTEM.to(torch.int32), [], DOC_A.numpy(), tuple(QUESTION.tolist())])
    assert fates(result)[:2] == [(7, Reason.EXACT), (18, Reason.EXACT)]
    assert result.input_ids.tolist() == [torch.cat([SYSTEM, DOC_A, QUESTION]).tolist()]


def test_the_report_tells_phases(blend: CacheBlend) -> None:
    blend.cache(DOC_A)
    report = blend.prefill(PROMPT).report
    assert report.fallback is None
    assert set(report.seconds) == {"plan", "probe", "load", "correct", "recompute"}


# Failures


def test_a_passage_that_fails_in_the_middle_makes_a_full_prefill(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend.cache(DOC_A)
    plain = StoredSegment.layer

    def fail_late(self: StoredSegment, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_id == 2:
            raise KVLoadError("the disk is gone")
        return plain(self, layer_id)

    monkeypatch.setattr(StoredSegment, "layer", fail_late)
    result = blend.prefill(PROMPT)
    assert result.report.fallback == "the disk is gone"
    torch.testing.assert_close(result.logits, own_prefill(MODEL, IDS).logits, atol=1e-5, rtol=0)


def test_corrupt_kv_is_seen(blend: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the exact tests: what lies in the cache does decide what comes out."""
    blend.cache(DOC_A, behind=SYSTEM)
    parts = [SYSTEM, DOC_A, QUESTION]
    right = blend.prefill(parts)
    plain = StoredSegment.layer

    def keys_of_others(self: StoredSegment, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = plain(self, layer_id)
        return k.flip(0), v

    monkeypatch.setattr(StoredSegment, "layer", keys_of_others)
    wrong = blend.prefill(parts)
    assert (wrong.logits - right.logits).abs().max() > 0.1
    assert not torch.equal(continuation(MODEL, wrong, 16), continuation(MODEL, right, 16))


def test_no_room_is_said() -> None:
    config = LMCacheEngineConfig.from_defaults(max_local_cpu_size=1e-5)
    with CacheBlend(MODEL, config=config) as blend:
        assert not blend.cache(DOC_A, behind=SYSTEM)
        result = blend.prefill(PROMPT)
    torch.testing.assert_close(result.logits, own_prefill(MODEL, IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ([-1], "-1"),
        ([VOCAB], str(VOCAB)),
        ([1.5], "integers"),
        (torch.zeros(1, 3, dtype=torch.int64), r"\[1, 3\]"),
        (torch.tensor([True]), "bool"),
    ],
)
def test_what_are_no_tokens_is_refused(blend: CacheBlend, part: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        blend.prefill([SYSTEM, part])
    with pytest.raises(ValueError, match=reason):
        blend.cache(part)


def test_nothing_at_all_is_refused(blend: CacheBlend) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        blend.prefill([[], ()])
    with pytest.raises(ValueError, match="at least one token"):
        blend.cache([])


@pytest.mark.parametrize("options", [{"policy": "nonsense"}, {"corrector": "nonsense"}])
def test_unknown_names_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        CacheBlend(MODEL, **options)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_ratios_beyond_0_to_1_are_refused(blend: CacheBlend, ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        blend.prefill(PROMPT, ratio=ratio)
    with pytest.raises(ValueError, match="ratio"):
        CacheBlend(MODEL, ratio=ratio)


def test_a_closed_one_is_closed() -> None:
    blend = CacheBlend(MODEL)
    blend.close()
    blend.close()
    with pytest.raises(RuntimeError, match="closed"):
        blend.prefill(PROMPT)


# Who shares what


def _other_weights() -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIGS["llama"]()).eval()
    model.load_state_dict(MODEL.state_dict())
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.001)
    return model


def test_one_engine_serves_several_and_salts_isolate() -> None:
    config = LMCacheEngineConfig.from_defaults()
    with LMCacheManager(config, engine_metadata(MODEL, config.chunk_size)) as manager:
        first = CacheBlend(MODEL, engine=manager.engine)
        second = CacheBlend(MODEL, engine=manager.engine, policy="none")
        salted = CacheBlend(MODEL, engine=manager.engine, cache_salt="tenant")
        first.cache(DOC_A)
        first.close()  # leaves the engine open
        assert fates(second.prefill([DOC_A, QUESTION]))[0][1] is Reason.EXACT
        assert fates(salted.prefill([DOC_A, QUESTION]))[0][1] is Reason.NOT_CACHED


def test_an_engine_of_other_weights_is_refused() -> None:
    config = LMCacheEngineConfig.from_defaults()
    with (
        LMCacheManager(config, engine_metadata(_other_weights(), config.chunk_size)) as manager,
        pytest.raises(ValueError, match="engine_metadata"),
    ):
        CacheBlend(MODEL, engine=manager.engine)


def test_passages_outlive_the_process_on_disk_for_the_same_weights_only(tmp_path: Path) -> None:
    config = LMCacheEngineConfig.from_defaults(local_disk=str(tmp_path), max_local_disk_size=0.1)
    with CacheBlend(MODEL, config=config) as blend:
        blend.cache(DOC_A, behind=SYSTEM)
    parts = [SYSTEM, DOC_A, QUESTION]
    with CacheBlend(MODEL, config=config) as blend:
        result = blend.prefill(parts)
    assert [fate for _, fate in fates(result)] == [Reason.EXACT, Reason.EXACT, Reason.NOT_CACHED]
    torch.testing.assert_close(result.logits, own_prefill(MODEL, torch.cat(parts)).logits, atol=1e-5, rtol=0)
    with CacheBlend(_other_weights(), config=config) as blend:
        assert [fate for _, fate in fates(blend.prefill(parts))] == [Reason.NOT_CACHED]


def test_bfloat16() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.bfloat16).eval()
    with CacheBlend(model) as blend:
        blend.cache(DOC_A, behind=SYSTEM)
        result = blend.prefill(PROMPT, ratio=1.0)
    assert result.keys[0].dtype == torch.bfloat16
    torch.testing.assert_close(result.logits, own_prefill(model, IDS).logits, atol=0.1, rtol=0.05)
