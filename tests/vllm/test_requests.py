"""What a request can ask for, and who may share with whom, on a real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.harness import run
from tests.vllm.lora import write_random_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_salts_and_adapters_never_share(tmp_path: Path) -> None:
    """Invariant 7: a prompt of another tenant or adapter is computed, whatever its tokens."""
    adapters = [str(write_random_adapter(tmp_path / f"adapter-{seed}", seed)) for seed in range(2)]
    answers = run("isolation", config={}, loras=adapters)
    # The order of asking: None None alice alice bob bob None
    assert [answer["reused"] for answer in answers["salts"]] == [0, 256, 0, 256, 0, 256, 256]
    # Adapters 0 0 1 1, then none (kept from above), then 0 again
    assert [answer["reused"] for answer in answers["adapters"]] == [0, 256, 0, 256, 256, 256]
    first, first_again, second, second_again, without, first_last = [answer["tokens"] for answer in answers["adapters"]]
    assert first == first_again == first_last
    assert second == second_again
    assert without == answers["salts"][0]["tokens"]
    assert len({tuple(first), tuple(second), tuple(without)}) == 3, "the adapters must matter for this test to tell"


def test_skip_save_and_skip_load() -> None:
    answers = run("request_params", config={})
    reused = {
        name: [answer["reuse"]["reused_tokens"] for answer in some] for name, some in answers.items() if name != "log"
    }
    assert reused == {
        "unsaved": [0],
        "after_unsaved": [0],
        "reused": [256],
        "not_loaded": [0],
        "twins": [0, 0, 0],
        "after_twins": [256],
    }
    texts = {name: {tuple(answer["tokens"]) for answer in some} for name, some in answers.items() if name != "log"}
    assert texts["unsaved"] == texts["after_unsaved"] == texts["reused"] == texts["not_loaded"]
    assert texts["twins"] == texts["after_twins"]


@pytest.mark.parametrize("connector", ["built-in", "dynamic"])
def test_beside_vllms_own_prefix_cache(connector: str) -> None:
    """vLLM's hits come first, ours continue behind them; chunked prefill in steps of 256 tokens."""
    answers = run("prefix_caching", config={"chunk_size": 128}, connector=connector)
    assert answers["short"][0]["tokens"] == answers["short_again"][0]["tokens"]
    assert answers["long"][0]["tokens"] == answers["repeat"][0]["tokens"] == answers["long_behind_short"][0]["tokens"]
    assert answers["short_again"][0]["reuse"]["reused_tokens"] == 384
    assert answers["long_behind_short"][0]["reuse"]["reused_tokens"] == 896 - 448
    assert answers["leaks"] == []
    if connector == "dynamic":
        assert answers["reset"] is True
        assert answers["after_reset"][0]["reuse"]["reused_tokens"] == 0
        assert answers["after_reset"][0]["tokens"] == answers["long"][0]["tokens"]


@pytest.mark.parametrize("connector", ["built-in", "dynamic"])
def test_aborts_while_loading_leak_nothing(connector: str, tmp_path: Path) -> None:
    answers = run("abort_while_loading", connector=connector, directory=str(tmp_path))
    assert answers["after"][0]["tokens"] == answers["expected"][0]["tokens"]
    assert answers["leaks"] == []
    assert answers["free"] == answers["total"]


@pytest.mark.parametrize("connector", ["built-in", "dynamic"])
def test_events_and_metrics_reach_vllm(connector: str) -> None:
    answers = run("observability", connector=connector)
    prompt = answers["prompt"]
    assert [event["tokens"] for event in answers["events"]] == [prompt[:256], prompt[256:512]]
    assert {event["block_size"] for event in answers["events"]} == {256}
    assert answers["chained"] == [True]
    if connector == "dynamic":  # the built-in wrapper passes no metrics on
        assert answers["metrics"]["vllm:lmcache_stored_tokens"]["value"] == 512
        reused = answers["metrics"]["vllm:lmcache_reused_tokens"]
        assert (reused["tier"], reused["value"]) == ("memory", 512)
        longest = answers["metrics"]["vllm:lmcache_longest_hook_seconds"]
        assert 0 < longest["value"] < 60
        assert longest["hook"]
    for lost in answers["milliseconds"]:
        assert lost.keys() == {"wait", "hooks"}
        assert 0 < lost["hooks"] < 60_000
