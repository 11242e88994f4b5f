"""Our HiCache backend, made by the factory of the installed SGLang."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.sglang.generation_ab import old_sglang

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
run = partial(old_sglang.run, mode="installed", module="tests.sglang.hicache.scenarios")


def test_pages_come_back_as_they_were() -> None:
    answer = run("pages")
    assert len(answer["rows"]) == 9
    for row in answer["rows"]:
        assert (row["absent"], row["present"], row["cleared"]) == (0, 4, 0), row
        assert row["missed"] == [False] * 4
        assert row["kept"] == [True] * 4
        assert row["got"] == [True] * 4 + [False]
        assert row["equal"], row
        assert row["generic_equal"], row
        assert row["again"], row
    assert answer["leaks"] == []


def test_random_calls_give_what_sglangs_file_backend_gives(tmp_path: Path) -> None:
    assert run("like_the_file_backend", folder=str(tmp_path / "hicache")) == {"differing": 0, "leaks": []}


def test_other_models_shards_and_arrangements_stay_apart(tmp_path: Path) -> None:
    answer = run("apart", folder=str(tmp_path / "cache"))
    others = dict.fromkeys(["model", "tp", "pp", "layout", "page", "dtype"], 0)
    assert answer["found"] == {"same": 4, "equal": True, **others}
    assert answer["leaks"] == []


def test_no_fault_reaches_sglang() -> None:
    answer = run("faults")
    assert answer["answers"]["find"][:2] == [False, 0]
    assert answer["answers"]["acquire_leading"][2] is False
    assert answer["answers"]["allocate"][3] is False
    assert answer["wrong"] == [None, None, False, False]
    assert answer["failures"] > 5
    assert "mamba" in answer["refused"]
    assert answer["after_close"] == [False, [False, False], [False, False]]
    assert answer["leaks"] == []
