"""Every subject measures what it says, on sizes that take no time. Nothing here looks at a speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lmcache.bench import disk
from lmcache.bench.report import Report
from lmcache.bench.rows import CannotMeasureError, Row
from lmcache.bench.run import SUBJECTS, measure
from lmcache.bench.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return replace(Settings.quick(tmp_path), runs=1, copy_bytes=1, disk_bytes=1, entries=(300,))


def measured(subject: str, settings: Settings) -> list[Row]:
    told: list[str] = []
    report = measure([subject], settings, told.append)
    assert told == [subject]
    assert Report.from_json(report.to_json()) == report
    for row in report.rows:
        assert row.subject == subject
        assert row.value > 0 or row.figure == "resident memory after it"
        assert (row.raw is None) == (row.share is None) == (not row.baseline)
    names = [(row.figure, row.case, row.entries) for row in report.rows]
    assert len(set(names)) == len(names)
    return report.rows


def targets(rows: list[Row]) -> set[str]:
    return {row.target for row in rows}


def test_keys(settings: Settings) -> None:
    rows = measured("keys", settings)
    assert len(rows) == 8
    assert targets(rows) == {"≤ 10 µs per 1,000 tokens"}


def test_memory(settings: Settings) -> None:
    assert targets(measured("memory", settings)) == {"≥ 90% of raw", ""}


def test_pages(settings: Settings) -> None:
    assert targets(measured("pages", settings)) == {"≥ 70% of raw", ""}


def test_disk(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether or not the file system of the tests has O_DIRECT: this is not about speed.
    monkeypatch.setattr(disk, "supports_direct_io", lambda directory: True)
    monkeypatch.setattr(disk, "O_DIRECT", 0)
    monkeypatch.setattr(disk, "SHAPES", disk.SHAPES[:1])
    assert targets(measured("disk", settings)) == {"≥ 85% of raw"}
    assert list(settings.directory.iterdir()) == []


def test_a_disk_without_direct_io_is_said_and_the_rest_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "supports_direct_io", lambda directory: False)
    with pytest.raises(CannotMeasureError):
        disk.measure_disk(settings)
    report = measure(["disk", "keys"], settings, lambda subject: None)
    assert {row.subject for row in report.rows} == {"keys"}
    assert len(report.notes) == 1
    assert "refuses O_DIRECT" in report.notes[0]


def test_lookup(settings: Settings) -> None:
    rows = measured("lookup", settings)
    assert {(row.case, row.entries) for row in rows} == {("memory tier", 300), ("disk tier", 300)}
    assert list(settings.directory.iterdir()) == []


def test_startup(settings: Settings) -> None:
    assert targets(measured("startup", settings)) == {"≤ 0.3 s", "≤ 1 s", "≤ 100 MB"}


def test_there_is_a_test_for_every_subject() -> None:
    assert all(f"test_{subject}" in globals() for subject in SUBJECTS)
