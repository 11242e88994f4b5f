"""Many random requests at once, on too few pages: nothing is wrong, nothing leaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.harness import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize(("connector", "seed"), [("built-in", 0), ("dynamic", 1)])
def test_200_random_requests(connector: str, seed: int, tmp_path: Path) -> None:
    """Shared prefixes, aborts and preemption, with (odd seed) and without vLLM's prefix cache, on memory so small that
    entries are evicted to disk all the time: texts are those of plain vLLM."""
    config = {
        "chunk_size": 64,
        "max_local_cpu_size": 0.012,
        "local_disk": str(tmp_path / "kv"),
        "max_local_disk_size": 0.06,
    }
    asked = {"seed": seed, "count": 200, "shallow": True}
    without = run("storm", connector=None, config={}, **asked)
    served = run("storm", connector=connector, config=config, **asked)

    assert served["preempted"] > 0, "the page pool must be small enough for this test to tell"
    assert served["reused"] > 5_000
    both = without["texts"].keys() & served["texts"].keys()
    assert len(both) > 120
    assert {name: served["texts"][name] for name in both} == {name: without["texts"][name] for name in both}
    assert served["leaks"] == []
    assert served["free"] == served["total"], "every block must come back once its save is done"


def test_wrong_kv_would_be_seen() -> None:
    asked = {"seed": 0, "count": 60, "shallow": True}
    without = run("storm", connector=None, config={}, **asked)["texts"]
    spoilt = run("storm", connector="built-in", config={"chunk_size": 64}, spoil=True, **asked)
    assert spoilt["reused"] > 1_000
    others = [name for name in without.keys() & spoilt["texts"].keys() if without[name] != spoilt["texts"][name]]
    assert len(others) > 10
