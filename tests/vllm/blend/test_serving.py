"""CacheBlend as vLLM serves it: right at ratio 1, never in an exact cache, and never the reason of a failed request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.harness import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MODULE = "tests.vllm.blend.serving_scenarios"


def was_blended(answer: dict[str, Any]) -> bool:
    blend = answer["reuse"]["blend"]
    return blend["fallback"] is None and bool(blend["segments"])


@pytest.mark.parametrize(("connector", "prompts", "rows"), [("built-in", 20, 2048), ("dynamic", 4, 128)])
def test_at_ratio_one_the_answer_is_that_of_full_prefill(connector: str, prompts: int, rows: int) -> None:
    """32 greedy tokens of each prompt, the second time in forwards of at most 128 rows."""
    found = run("served", module=MODULE, connector=connector, prompts=prompts, rows=rows)

    assert [blended["tokens"] for _, blended in found["pairs"]] == [full["tokens"] for full, _ in found["pairs"]]
    for _, blended in found["pairs"]:
        report = blended["reuse"]["blend"]
        assert was_blended(blended)
        assert list(report["milliseconds"])[:3] == ["find", "wait", "plan"]
        assert report["recomputed_tokens"] == sum(end - start for start, end in report["recomputed"]) > 300
    # Two blended prompts and a plain one in one batch
    assert [answer["tokens"] for answer in found["mixed"]] == [answer["tokens"] for answer in found["apart"]]
    assert [bool(answer["reuse"]["blend"]) for answer in found["mixed"]] == [True, False, True]
    # A step has no more blends than it may compute tokens, or one.
    assert sum(map(len, found["in_steps"])) == 2
    assert all(len(step) == 1 or sum(step) <= rows for step in found["in_steps"])
    assert (max(map(len, found["in_steps"])) == 1) == (sum(map(sum, found["in_steps"])) > rows)
    # Behind what vLLM's own prefix cache had
    expected, behind = found["behind"]
    assert behind["tokens"] == expected["tokens"]
    assert was_blended(behind)
    assert behind["reuse"]["blend"]["prefix_tokens"] > 128
    assert found["leaks"] == []
    # Noise in place of KV: of no matter where all is computed, and seen where nothing is.
    assert found["noise"]["all"]["tokens"] == found["apart"][0]["tokens"]
    assert found["noise"]["none"]["tokens"] != found["apart"][0]["tokens"]


def same(expected: dict[str, Any], answer: dict[str, Any]) -> bool:
    return answer["tokens"] == expected["tokens"] and answer["logprobs"] == pytest.approx(
        expected["logprobs"], abs=1e-3
    )


def attacks(salted: bool) -> dict[str, Any]:
    found = run("attacks", module=MODULE, salted=salted)
    del found["log"]
    return found


def test_no_plain_request_is_served_with_blended_kv() -> None:
    for name, attack in attacks(salted=True).items():
        # Behind an equal plain request at the same moment there is nothing to blend: vLLM shares its blocks at once.
        assert attack["blended"] > 0 or name == "together, plain first", f"{name}: nothing was tried"
        for answer in attack["answers"]:
            assert same(attack["expected"], answer), name


def test_without_the_salt_plain_requests_would_be_served_with_blended_kv() -> None:
    found = attacks(salted=False)
    spoilt = {name for name, attack in found.items() if not all(same(attack["expected"], a) for a in attack["answers"])}
    assert {"after", "two blended at once"} <= spoilt


def test_a_blend_that_fails_anywhere_is_answered_from_full_prefill() -> None:
    found = run("faults", module=MODULE, shallow=True)
    for name, answer in found["answers"].items():
        if name.endswith("call 0"):
            assert answer["failed"], f"{name} was never called"
        assert answer["tokens"] == answer["expected"] or not answer["failed"] or "report" in name, name
        if answer["failed"]:
            assert answer["segments"] == 0, name
            reused, by_a_plain_one = answer["reused"]
            if "report" not in name:  # there the blend itself is done
                assert reused <= by_a_plain_one, f"{name}: what was promised and not given is counted"
        assert answer["blends_again"], name
    assert found["leaks"] == []
    assert found["reports"] == 0
    assert found["metrics"]['lmcache_blend_fallbacks_total{reason="error"}'] >= 5


def test_300_random_requests() -> None:
    """Blended, plain and aborted, with preemption: the plain ones get what they get of a vLLM without us."""
    without = run("storm", module=MODULE, blending=False, count=300, shallow=True)
    served = run("storm", module=MODULE, blending=True, count=300, shallow=True)

    assert served["preempted"] > 0, "the page pool must be small enough for this test to tell"
    assert served["blended"] > 50
    both = without["texts"].keys() & served["texts"].keys()
    assert len(both) > 90
    assert {name: served["texts"][name] for name in both} == {name: without["texts"][name] for name in both}
    assert served["leaks"] == []
    assert served["free"] == served["total"]


def test_passages_between_separators_are_found_and_nothing_across_them() -> None:
    found = run("separated", module=MODULE)
    for text, passage in zip(found["texts"], (found["passages"][2], found["passages"][0]), strict=True):
        # Its first and last word may be of one token with the separator, and then belong to that.
        assert text.strip() in passage
        assert len(text) > 0.9 * len(passage)
    (named,) = found["named"]["reuse"]["blend"]["segments"]
    assert named["end"] - named["start"] > 100
    for name, message in (
        ("out of range", "lmcache.segments"),
        ("ratio", "lmcache.blend_ratio=7"),
        ("policy", "unknown selection policy"),
    ):
        assert message in found[name]["reuse"]["blend"]["fallback"]
        assert found[name]["tokens"] == found["plain"]["tokens"]


def test_after_a_restart_passages_come_from_disk(tmp_path: Path) -> None:
    before = run("on_disk", module=MODULE, directory=str(tmp_path), warm=True)
    after = run("on_disk", module=MODULE, fresh=True, directory=str(tmp_path), warm=False)
    assert after["known"] == before["known"] > 6
    assert was_blended(after["blended"])
    assert {tier for one in after["blended"]["reuse"]["blend"]["segments"] for tier in one["tokens_by_tier"]} == {
        "disk"
    }
    assert after["blended"]["tokens"] == after["expected"]["tokens"]
    assert after["leaks"] == []
