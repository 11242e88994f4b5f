from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcache.cli.main import app
from lmcache.config import LMCacheEngineConfig


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)


def test_json_has_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "128")
    result = CliRunner().invoke(app, ["config", "--json"])
    assert result.exit_code == 0
    options = json.loads(result.stdout)
    assert list(options) == list(LMCacheEngineConfig.model_fields)
    assert options["chunk_size"] == {
        "value": 128,
        "source": "environment variable LMCACHE_CHUNK_SIZE",
        "description": LMCacheEngineConfig.model_fields["chunk_size"].description,
    }
    assert options["local_disk"]["source"] == "default"


def test_table_has_a_line_for_every_key(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text("blend_special_str: '[bold] '\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["config", "--file", str(file)])
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert set(LMCacheEngineConfig.model_fields) <= set(lines)
    assert '"[bold] "' in lines["blend_special_str"]
    assert "YAML file" in lines["blend_special_str"]


def test_file_replaces_the_one_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(tmp_path / "absent.yaml"))
    file = tmp_path / "lmcache.yaml"
    file.write_text("chunk_size: 64\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["config", "--file", str(file), "--json"])
    assert json.loads(result.stdout)["chunk_size"]["value"] == 64


def test_a_wrong_value_ends_with_words_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "many")
    result = CliRunner().invoke(app, ["config"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "chunk_size='many' (environment variable LMCACHE_CHUNK_SIZE): must be a whole number" in result.stderr
    assert "Traceback" not in result.stderr


def test_runs_as_a_command_and_warns_on_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from lmcache.cli.main import app; app()", "config", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"LMCACHE_CHUNKSIZE": "8", "PATH": ""},
    )
    assert json.loads(done.stdout)["chunk_size"]["value"] == 256
    assert (
        done.stderr
        == "environment variable: LMCACHE_CHUNKSIZE is unknown and ignored; did you mean LMCACHE_CHUNK_SIZE?\n"
    )


def test_help_lists_the_subcommand() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "config" in result.stdout
