"""SGLang's own ``LMCRadixCache``, of 0.5.12 and 0.5.17, on our connectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sglang.generation_ab.old_sglang import VERSIONS, run

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
modes = pytest.mark.parametrize("mode", VERSIONS)


def even(row: dict) -> None:
    assert row["unaccounted"] == 0, "slots were lost, or freed twice"
    assert row["locked"] == 0
    assert row["leaks"] == []


@modes
def test_loaded_kv_is_what_was_stored(mode: str) -> None:
    for row in run("reuse", mode)["rows"]:
        served, page, chunk = row["served"], row["page"], row["chunk"]
        assert all(one["wrong"] == 0 for one in served.values()), row
        assert served["cold"]["loaded"] == 0
        assert served["again"]["loaded"] == 96  # 98 tokens asked for, 101 stored
        assert served["longer"]["resident"] == 101 // page * page
        resident = 13 // page * page
        assert served["behind_resident"]["resident"] == resident
        assert served["behind_resident"]["loaded"] == 96 - resident
        assert (resident % chunk != 0) == (page < 16), "prefix_pad must have been at work"
        # Known of these versions: SGLang does not say whose prompt it is.
        assert served["other_tenant"]["loaded"] == 96
        assert row["failures"] == 0
        even(row)


@modes
def test_chunks_that_do_not_end_with_pages(mode: str) -> None:
    for row in run("unaligned_chunks", mode)["rows"]:
        assert all(one["wrong"] == 0 for one in row["served"].values()), row
        assert row["served"]["again"]["loaded"] == 60 // row["page"] * row["page"]
        even(row)


@modes
def test_what_is_stored_is_unlocked_without_an_eviction(mode: str) -> None:
    """Otherwise requests may wait for room for ever: SGLang unlocks it when it evicts, and evicts what is unlocked."""
    answer = run("stored_nodes", mode)
    assert answer["locked"][1] == 0
    assert answer["failures"] == 0


@modes
def test_wrong_kv_would_be_noticed(mode: str) -> None:
    assert run("corrupted", mode)["served"]["again"]["wrong"] > 0


@modes
@pytest.mark.parametrize("page", [1, 4, 16])
def test_random_requests_with_shared_prefixes(mode: str, page: int) -> None:
    answer = run("storm", mode, page=page)
    assert answer["wrong"] == 0
    assert answer["loaded"] > 500
    assert answer["failures"] == 0
    even(answer)


@modes
def test_random_requests_through_the_disk(mode: str, tmp_path: Path) -> None:
    answer = run("storm", mode, page=4, disk=str(tmp_path / "cache"))
    assert answer["wrong"] == 0
    assert answer["loaded"] > 500
    even(answer)


@modes
def test_an_exception_of_ours_never_reaches_sglang(mode: str) -> None:
    """Invariant 4, for every call that a connector makes."""
    answer = run("faults", mode)
    for name, one in answer["answers"].items():
        assert one["wrong"] == 0, name
    assert answer["answers"]["healed"]["loaded"] == 96
    lost = {"prefix_keys", "acquire_leading", "batched_to_gpu", "retrieve", "load", "agree"}
    for name in lost | ({"prefetch"} if mode == "MP" else {"find"}):
        assert answer["answers"][name]["loaded"] == 0, name
        assert answer["answers"][name]["failures"] > 0, name
    even(answer)


@modes
def test_a_restart_finds_what_the_disk_holds(mode: str, tmp_path: Path) -> None:
    disk = str(tmp_path / "cache")
    assert run("first_life", mode, disk=disk)["served"]["cold"]["loaded"] == 0
    answer = run("second_life", mode, disk=disk)
    assert answer["served"]["again"] == {"resident": 0, "loaded": 96, "wrong": 0, "total": 100}
    assert answer["reused"]["disk"] == 96
    even(answer)


@modes
def test_two_ranks_load_equally_much(mode: str) -> None:
    ranks = run("two_ranks", mode)["ranks"]
    for name, loaded in {"cold": 0, "again": 96, "unequal": 32, "one_fails": 0}.items():
        assert [rank["served"][name]["loaded"] for rank in ranks] == [loaded, loaded], name
        assert [rank["served"][name]["wrong"] for rank in ranks] == [0, 0], name
    # A process group, SGLang's coordinator, and what SGLang passes of it.
    assert [rank["agreed"] for rank in ranks] == [[4, 4, 4]] * 2
    for rank in ranks:
        even(rank)
