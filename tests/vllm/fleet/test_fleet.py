"""What one vLLM stored, another that has seen nothing reuses, as a prefix and as a passage."""

from __future__ import annotations

from typing import Any

import pytest

from tests.storage.remote.false_store import falsify
from tests.vllm.harness import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MODULE = "tests.vllm.fleet.scenarios"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("store")
    url = f"file://{directory}/kv"
    first = run("learn", module=MODULE, url=url)
    second = run("ask", module=MODULE, fresh=True, url=url)
    assert falsify(directory / "kv") > 0
    return {"first": first, "second": second, "falsified": run("ask", module=MODULE, url=url)}


def test_a_prefix_that_another_server_computed_is_reused_and_the_text_is_the_same(answers: dict[str, Any]) -> None:
    same, expected = answers["second"]["same"], answers["second"]["expected"][0]
    assert same["tokens"] == expected["tokens"] == answers["first"]["answer"]["tokens"]
    reuse = same["reuse"]
    assert reuse["tokens_by_tier"] == {"remote": reuse["reused_tokens"]}
    assert reuse["reused_tokens"] == reuse["prompt_tokens"] // 64 * 64


def test_passages_that_another_server_has_seen_are_blended(answers: dict[str, Any]) -> None:
    blended, expected = answers["second"]["blended"], answers["second"]["expected"][1]
    assert blended["tokens"] == expected["tokens"], "every token was computed, so the text is that of a full prefill"
    for answer in (blended, answers["second"]["few"]):
        reuse = answer["reuse"]
        assert reuse["blend"]["fallback"] is None
        assert reuse["tokens_by_tier"].keys() <= {"remote", "memory"}
        assert reuse["reused_tokens"] > 0.7 * reuse["prompt_tokens"]
    assert answers["second"]["blended"]["reuse"]["tokens_by_tier"].get("remote", 0) > 0


def test_false_kv_in_the_store_changes_the_text(answers: dict[str, Any]) -> None:
    false = answers["falsified"]
    assert false["same"]["reuse"]["tokens_by_tier"].get("remote", 0) > 0
    assert false["same"]["tokens"] != false["expected"][0]["tokens"]
    assert false["few"]["tokens"] != false["expected"][1]["tokens"]


def test_nothing_leaks(answers: dict[str, Any]) -> None:
    assert answers["second"]["leaks"] == []
