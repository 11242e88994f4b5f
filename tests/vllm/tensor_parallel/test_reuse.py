"""Prefix reuse where every rank is a process of its own: all ranks see a chunk, or none does.

About 20 s and 2 GB a vLLM on two cores.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.harness import run as run_module

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

run = partial(run_module, module="tests.vllm.tensor_parallel.scenarios", timeout=600)

LENGTHS = [300, 700, 1000]
CHUNK = 64
CONFIG = {"chunk_size": CHUNK, "max_local_cpu_size": 0.25}
WHOLE_CHUNKS = [length // CHUNK * CHUNK for length in LENGTHS]


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def reused(answers: list[dict[str, Any]]) -> list[int]:
    return [answer["reuse"]["reused_tokens"] for answer in answers]


FAULTY = [[1000, 2], [300, 1, 500, 3]]


@pytest.fixture(scope="module")
def plain(model: str) -> list[list[int]]:
    """Of one rank, without us."""
    return tokens(run("plain", model=model, tp=1, lengths=LENGTHS, prompts=FAULTY)["answers"])


@pytest.fixture(scope="module")
def expected(plain: list[list[int]]) -> list[list[int]]:
    return plain[: len(LENGTHS)]


@pytest.mark.parametrize(
    ("tp", "connector", "options"),
    [
        (2, "built-in", {}),
        (2, "dynamic", {"use_layerwise": True}),
        # One rank, but not in the scheduler's process: what vLLM does on a CPU unless told otherwise.
        (1, "dynamic", {}),
    ],
)
def test_text_of_two_ranks_with_reuse_is_that_of_one_without(
    tp: int, connector: str, options: dict[str, Any], model: str, expected: list[list[int]]
) -> None:
    served = run(
        "reuse",
        model=model,
        tp=tp,
        lengths=LENGTHS,
        config={**CONFIG, **options},
        connector=connector,
        distributed_executor_backend="mp",
        start_method="spawn" if connector == "built-in" else "fork",
    )
    assert tokens(served["first"]) == expected
    assert tokens(served["again"]) == expected
    assert reused(served["first"]) == [0, 0, 0]
    assert reused(served["again"]) == WHOLE_CHUNKS
    assert {answer["reuse"]["tier"] for answer in served["again"]} == {"memory"}

    # Noise in one rank's share of the KV is seen, so equal text above is no accident.
    assert all(corrupted != right for corrupted, right in zip(tokens(served["corrupted"]), expected, strict=True))

    digests = [rank["digests"] for rank in served["ranks"]]
    assert len(digests[0]) == sum(WHOLE_CHUNKS) // CHUNK
    assert all(other == digests[0] for other in digests), "all ranks call the same tokens by the same digest"
    keys = [key for rank in served["ranks"] for key in rank["keys"]]
    assert len(set(keys)) == len(keys), "no two ranks share an entry"
    for rank in served["after"]:
        assert rank["leaks"] == []
        assert rank["failed_loads"] == 0
    assert served["free"], "every page is given back"


@pytest.mark.parametrize("connector", ["built-in", "dynamic"])
def test_what_one_rank_has_lost_or_cannot_load_no_rank_reuses(
    connector: str, model: str, plain: list[list[int]]
) -> None:
    told = run("faults", model=model, tp=2, config=CONFIG, connector=connector)
    long, longer = plain[len(LENGTHS) :]
    assert tokens(told["expected"]) == [long]
    assert tokens(told["shortened"]) == [long]
    assert reused(told["shortened"]) == [5 * CHUNK]
    assert "broken on purpose" in told["log"]
    assert tokens(told["failed"]) == [longer, longer]
    assert reused(told["failed"]) == [0, 0]
    if connector == "built-in":
        # The forward on pages that one rank had not filled: neither has kept what it computed.
        assert told["ranks"][0]["digests"] == told["ranks"][1]["digests"]
    for rank in told["ranks"]:
        assert rank["leaks"] == []
        assert rank["failed_loads"] == 0
    assert told["free"]


def test_what_is_on_the_disks_of_the_ranks_is_found_after_a_restart(
    model: str, expected: list[list[int]], tmp_path: Path
) -> None:
    config = {**CONFIG, "local_disk": str(tmp_path), "max_local_disk_size": 1.0}
    first = run("asked", model=model, tp=2, lengths=LENGTHS, config=config)
    again = run("asked", fresh=True, model=model, tp=2, lengths=LENGTHS, config=config)
    assert reused(first["answers"]) == [0, 0, 0]
    assert reused(again["answers"]) == WHOLE_CHUNKS
    assert {answer["reuse"]["tier"] for answer in again["answers"]} == {"disk"}
    assert tokens(again["answers"]) == expected
    assert all(rank["leaks"] == [] for rank in again["ranks"])
