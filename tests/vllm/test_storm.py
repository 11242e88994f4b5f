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
    config = {"chunk_size": 64, "max_local_cpu_size": 0.06, "local_disk": str(tmp_path), "max_local_disk_size": 0.3}
    without = run("storm", connector=None, config={}, seed=seed, count=200)
    served = run("storm", connector=connector, config=config, seed=seed, count=200)

    assert served["preempted"] > 0, "the page pool must be small enough for this test to tell"
    assert served["reused"] > 5_000
    both = without["texts"].keys() & served["texts"].keys()
    assert len(both) > 120
    assert {name: served["texts"][name] for name in both} == {name: without["texts"][name] for name in both}
    assert served["leaks"] == []
    assert served["free"] == served["total"], "every block must come back once its save is done"
