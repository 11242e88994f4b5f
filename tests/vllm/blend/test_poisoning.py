"""Blended KV reaches neither vLLM's prefix cache nor ours, and a blend never stands on pages that are yet to be filled.

Every answer is compared with that of a vLLM that runs without us.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import harness

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

run = partial(harness.run, module="tests.vllm.blend.poisoning_scenarios", shallow=True)
TOLERANCE = 1e-3
"""Of logprobs: float32 in batches of other sizes differs by less than 1e-4, blended KV by 0.05 at least."""


def spoilt(*found: dict[str, Any]) -> set[str]:
    """Attacks of which a plain request was served otherwise than by a fresh vLLM."""
    attacks = [attack for one in found for attack in one["attacks"]]
    prompts = [list(prompt) for prompt in {tuple(prompt) for _, prompt, _ in attacks}]
    answers = run("fresh", prompts=prompts)["answers"]
    expected = {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
    return {name for name, prompt, answer in attacks if not same(expected[tuple(prompt)], answer)}


def same(expected: dict[str, Any], answer: dict[str, Any]) -> bool:
    return answer["tokens"] == expected["tokens"] and all(
        two == pytest.approx(best_two, abs=TOLERANCE)
        for best_two, two in zip(expected["best_two"], answer["best_two"], strict=True)
    )


@pytest.mark.parametrize("second_runner", [False, True])
def test_a_blend_that_is_preempted_and_resumed_stays_out_of_exact_caches(second_runner: bool) -> None:
    found = run("preempted", defended=True, second_runner=second_runner)
    assert found["preempted"] > 0
    assert found["blended"] == 1
    assert spoilt(found) == set()
    assert found["leaks"] == []


def test_what_a_server_with_a_disk_kept_of_blends_serves_nobody(tmp_path: Path) -> None:
    """Not in the same process, not behind generated tokens, not after a restart."""
    found = run("filled", directory=str(tmp_path), defended=True)
    assert found["blended"] == 2, "a prompt that fills no page has no name to change: it is not blended"
    prompts = [prompt for _, prompt, _ in found["attacks"]]
    after = run("restarted", fresh=True, directory=str(tmp_path), prompts=prompts, known=found["known"])
    assert after["exact"] == 512, "what was computed exactly is served"
    assert spoilt(found, after) == set()
    assert found["leaks"] == after["leaks"] == []


def test_without_the_defence_each_of_these_attacks_would_succeed(tmp_path: Path) -> None:
    preempted = run("preempted", defended=False)
    found = run("filled", directory=str(tmp_path), defended=False)
    after = run(
        "restarted",
        directory=str(tmp_path),
        prompts=[prompt for _, prompt, _ in found["attacks"]],
        known=found["known"],
    )
    assert spoilt(preempted, found, after) >= {
        "while it waits",
        "afterwards",
        "continued",
        "in whole pages",
        "in whole pages, continued",
        "in the last page, continued",
        "restarted",
    }


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_blend_waits_for_a_prefix_that_another_request_is_about_to_fill(layerwise: bool) -> None:
    """At ratio 1, behind blocks that vLLM's prefix cache has by name, while that very step computes or loads them."""
    found = run("prefix_in_flight", layerwise=layerwise)
    assert found["blended"] == 1
    assert spoilt(found) == set()
    assert found["leaks"] == []


@pytest.mark.parametrize("computed", [True, False])
def test_no_blend_stands_on_a_prefix_that_another_request_failed_to_load(computed: bool) -> None:
    """It may stand on one that was computed in place of the load. Otherwise vLLM takes such a prefix for computed again
    by the other, and everything behind it for right."""
    found = run("prefix_in_flight", failing=True, computed=computed)
    assert found["blended"] == int(computed)
    assert spoilt(found) == set()
    assert found["leaks"] == []
