from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lmcache.bench import plot
from lmcache.cli.main import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = run("keys", "--quick", "--json", str(file), "--directory", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stderr == "measuring keys …\n"
    rows = json.loads(file.read_bytes())["rows"]
    assert len(rows) == 8
    assert result.stdout.count("131,072 tokens") == 4
    assert {"subject", "figure", "case", "unit", "value", "raw", "share", "target", "met"} <= set(rows[0])


@pytest.mark.skipif(not plot.can_plot(), reason="matplotlib is optional")
def test_draws(tmp_path: Path) -> None:
    result = run("keys", "--quick", "--plot", str(tmp_path / "images"))
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["bench-keys.png"]


def test_says_before_measuring_that_matplotlib_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "can_plot", lambda: False)
    result = run("--plot", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr == "plots need matplotlib: pip install 'lmcache-blend[bench]'\n"


def test_refuses_an_unknown_subject() -> None:
    result = run("kyes")
    assert result.exit_code == 2
    assert result.stderr == "'kyes' is not one of keys, memory, pages, disk, lookup, startup, all\n"


def test_refuses_a_directory_that_is_not_there(tmp_path: Path) -> None:
    result = run("disk", "--directory", str(tmp_path / "absent"))
    assert result.exit_code == 2
    assert "is not a directory that can be written" in result.stderr
