from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcache.bench.plot import can_plot, plot
from lmcache.bench.report import Report
from lmcache.bench.rows import Row, Spread
from lmcache.bench.table import HEADERS, cells
from lmcache.bench.timing import Work, share, take_turns


def copy_row(median: float, min_share: float | None = 0.9) -> Row:
    spread = Spread(median, median - 0.1, median + 0.1)
    return Row("memory", "store", "model", "GB/s", 9.0, "copy", 10.0, spread, min_share=min_share)


def test_a_share_meets_its_target_from_the_target_on() -> None:
    assert copy_row(0.9).met is True
    assert copy_row(0.89).met is False
    assert copy_row(0.89, min_share=None).met is None


def test_a_value_meets_its_target_up_to_the_target() -> None:
    def met(value: float) -> bool | None:
        return Row("startup", "import", "", "s", value, max_value=0.3).met

    assert met(0.3) is True
    assert met(0.31) is False


def test_a_report_comes_back_from_json() -> None:
    report = Report(
        "machine", 1.5, [copy_row(0.8), Row("lookup", "start", "disk tier", "s", 1.0, entries=10)], ["none"]
    )
    data = report.to_json()
    assert Report.from_json(data) == report
    first = json.loads(data)["rows"][0]
    assert (first["target"], first["met"]) == ("≥ 90% of raw", False)


def test_every_row_has_a_cell_for_every_header() -> None:
    words = cells(Row("lookup", "lookup of 32k tokens", "memory tier", "ms", 0.4567, max_value=0.5, entries=100_000))
    assert len(words) == len(HEADERS)
    assert words == ("lookup of 32k tokens", "memory tier, 100,000 chunks", "0.457 ms", "", "", "≤ 0.5 ms", "yes")


def test_works_take_turns_and_are_prepared_untimed() -> None:
    calls: list[str] = []

    def note(name: str) -> Work:
        return Work(lambda: calls.append(name), before=lambda: calls.append(f"before {name}"))

    taken = take_turns({"a": note("a"), "b": note("b")}, runs=2)
    a, b = ["before a", "a"], ["before b", "b"]
    assert calls == a + b + b + a + a + b  # the first pair is not counted
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}


def test_share_is_taken_run_by_run() -> None:
    # A machine that becomes ten times slower in the midst of it changes nothing.
    assert share([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == Spread(0.5, 0.5, 0.5)
    assert share([4.0], [1.0]) == Spread(0.25, 0.25, 0.25)


@pytest.mark.skipif(not can_plot(), reason="matplotlib is optional")
def test_a_picture_for_each_kind_of_row(tmp_path: Path) -> None:
    growth = [
        Row("lookup", figure, f"{tier} tier", "ms", 1.0 / entries, entries=entries, max_value=limit)
        for figure in ("one", "two", "three", "four")
        for tier in ("memory", "disk")
        for entries, limit in ((10, None), (1000, 0.5))
    ]
    keys = [
        Row("keys", f"{kind} keys", case, "µs", 4.0, "blake3 alone", 3.0, max_value=10.0)
        for kind in ("prefix", "segment")
        for case in ("list", "tensor")
    ]
    written = plot([copy_row(0.8), *keys, *growth], tmp_path / "images")
    assert [path.name for path in written] == ["bench-throughput.png", "bench-keys.png", "bench-growth.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert plot([], tmp_path) == []
