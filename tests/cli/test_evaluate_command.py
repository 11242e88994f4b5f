from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("transformers")

from lmcache.bench import plot
from lmcache.cli import evaluate_command
from lmcache.cli.main import app
from tests.evaluation.tiny_model import save_tiny_model

SMALL = ["--tasks", "2", "--policies", "none,kv_deviation,query_attention(layers=late)", "--budgets", "0.3,0.6"]
FEW_ANSWERS = 2 * (1 + 1 + 2 * 1 + 1 * 1)  # kv_deviation cannot be as cheap as 0.3 with 4 layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_prints_a_table_writes_json_and_draws(folder: Path, tmp_path: Path) -> None:
    result = run("--model", folder, "--out", tmp_path, *SMALL, "--correctors", "none", "--context", "prompt")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("query_attention(layers=late)") == 2
    assert "2 tasks (generated from seed 0)" in result.stdout
    assert "not run: kv_deviation at 0.3: " in result.stderr
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert len(report["rows"]) + len(report["full_prefills"]) == FEW_ANSWERS
    assert report["settings"]["context"] == "prompt"
    assert report["verdict"] is None
    assert (tmp_path / "quality.png").exists() == plot.can_plot()


def test_goes_on_with_what_is_there(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", folder, "--out", tmp_path, *SMALL, "--correctors", "none"]
    first = run(*arguments)
    (rows,) = tmp_path.glob("rows-*.jsonl")
    written = rows.read_bytes()
    again = run(*arguments)
    assert rows.read_bytes() == written
    assert again.stdout.splitlines()[:-3] == first.stdout.splitlines()[:-3]
    run(*arguments, "--fresh")
    assert rows.read_bytes() != written  # other seconds
    assert len(rows.read_bytes().splitlines()) == len(written.splitlines()) == 1 + FEW_ANSWERS


def test_gate_and_recommendation(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "--model",
        folder,
        "--out",
        tmp_path,
        "--tasks",
        "1",
        "--policies",
        "random,none",
        "--budgets",
        "0.5,1",
    ]
    failed = run(*arguments, "--correctors", "none", "--gate", "kl=1e-6,agreement=1")
    assert failed.exit_code == 1
    assert "below the gate: random at 0.5: kl is " in failed.stdout
    assert "random at 1:" not in failed.stdout
    assert "the gate (kl ≤ 1e-06, agreement ≥ 1) is not passed" in failed.stdout
    assert run(*arguments, "--correctors", "none", "--gate", "kl=100").exit_code == 0
    named = run(*arguments, "--correctors", "none", "--gate", "kl=1e-6", "--recommend")
    assert named.exit_code == 0
    assert "recommended: policy random, corrector none, ratio 1: the cheapest that passes" in named.stdout
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["verdict"]["recommended"]["variant"]["policy"] == "random"


def test_takes_the_users_own_tasks(folder: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"passages": ["She plays the harp.", "He plays."], "question": "Who?", "answer": "she"}\n')
    result = run("--model", folder, "--out", tmp_path, "--tasks-file", tasks, "--policies", "none")
    assert result.exit_code == 0, result.output
    assert f"1 tasks ({tasks})" in result.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/absent"], "/absent is not a directory: give the folder of a downloaded model"),
        (["--policies", "best"], "--policies: unknown selection policy 'best': must be one of none, full"),
        (["--policies", "sink(q=1)"], "its options: k"),
        (["--correctors", "red"], "--correctors: unknown corrector 'red': must be one of none"),
        (["--budgets", "0.1,half"], "--budgets: 'half' is not a number"),
        (["--budgets", "15"], "--budgets: 15 must be above 0 and at most 1"),
        (["--context", "none"], "--context none: choose from alone, system, prompt, prefix"),
        (["--dtype", "int4"], "dtype 'int4': choose from float32"),
        (["--device", "moon"], "--device moon: "),
        (["--gate", "kl"], "'kl': write FIGURE=LIMIT"),
        (["--tasks-file", "/absent.jsonl"], "cannot read tasks from /absent.jsonl"),
    ],
)
def test_refuses_in_one_line(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("--model", folder, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_says_that_transformers_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_command, "find_spec", lambda name: None)
    result = run("--model", folder)
    assert result.exit_code == 2
    assert result.stderr == "evaluating needs transformers: pip install 'lmcache-blend[transformers]'\n"


def test_goes_without_a_picture_when_matplotlib_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "can_plot", lambda: False)
    result = run("--model", folder, "--out", tmp_path, "--tasks", "1", "--policies", "none")
    assert result.exit_code == 0
    assert "plots need matplotlib" in result.stderr
    assert not (tmp_path / "quality.png").exists()
