from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lmcache.bench.plot import can_plot
from lmcache.evaluation.figures import Summary, summarise
from lmcache.evaluation.gate import parse_gate
from lmcache.evaluation.plot import plot
from lmcache.evaluation.report import Report
from lmcache.evaluation.row_file import RowFile
from lmcache.evaluation.runs import make_prompts, run
from lmcache.evaluation.table import rich_table
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.evaluation.variants import NotRun, Variant
from lmcache.evaluation.verdict import judge
from tests.evaluation.fake_subject import SETTINGS, FakeSubject

NONE, FULL = Variant("none", "none", 0.0, 0.0), Variant("full", "none", 1.0, 1.0)
RANDOM = [Variant("random", "none", budget, budget) for budget in (0.2, 0.4)]
SHIFTED = [Variant("random", "key_shift", budget, budget) for budget in (0.2, 0.4)]
VARIANTS = [NONE, *RANDOM, *SHIFTED, FULL]


def make_report(directory: Path) -> Report:
    subject = FakeSubject(answer="the answer is 1, or 2, or 3, or 4, or 5, or 6")
    prompts = make_prompts(subject, generate_tasks(10), "alone")
    digests = [prompt.digest for prompt in prompts]
    with RowFile(directory, SETTINGS) as rows:
        list(run(subject, prompts, VARIANTS, rows))
        return Report(
            machine="a machine",
            settings=SETTINGS,
            tasks="generated",
            seed=7,
            summary=summarise(rows, digests, VARIANTS, seed=7),
            not_run=[NotRun("kv_deviation", 0.02, "it costs more")],
            full_prefills=list(rows.full.values()),
            rows=list(rows.blends.values()),
        )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_report(tmp_path_factory.mktemp("rows"))


def test_figures_are_means_over_the_tasks(report: Report) -> None:
    none, low, high, *_, full = report.summary.figures
    assert [f.variant for f in report.summary.figures] == VARIANTS
    assert (full.kl.value, full.agreement.value, full.charged_budget) == (0, 1, 1)
    assert none.kl.value > low.kl.value > high.kl.value > 0
    assert (low.agreement.value, high.agreement.value) == (9 / 45, 18 / 45)
    assert full.time.value == 0.25


def test_exact_match_counts_only_what_full_prefill_answers(report: Report) -> None:
    answered = sum(full.answered is True for full in report.full_prefills)
    assert report.summary.answered == answered > 0
    assert len(report.full_prefills) > answered
    *_, full = report.summary.figures
    assert full.exact_match is not None
    assert full.exact_match.value == 1
    none = report.summary.figures[0].exact_match
    assert none is not None
    assert none.value == 0


def test_relative_kl_is_a_ratio_of_means(report: Report) -> None:
    summary: Summary = report.summary
    ratio = summary.relative_to(RANDOM[1], RANDOM[0])
    assert ratio is not None
    low, high = summary.figures[1:3]
    assert ratio.value == pytest.approx(high.kl.value / low.kl.value)
    assert summary.relative_to(SHIFTED[0], RANDOM[0]) is not None
    assert summary.relative_to(RANDOM[0], FULL) is None  # whose KL is 0


def test_json_has_everything(report: Report) -> None:
    verdict = judge(report.summary, parse_gate("kl=0.01"), recommending=True)
    found = json.loads(report.to_json(verdict))
    assert found["settings"]["dtype"] == "float32"
    assert (found["machine"], found["seed"], found["tasks"]) == ("a machine", 7, "generated")
    assert len(found["rows"]) == 10 * len(VARIANTS)
    assert found["summary"]["num_tasks"] == len(found["full_prefills"]) == 10
    assert {"low", "value", "high"} == set(found["summary"]["figures"][0]["kl"])
    assert found["not_run"] == [{"policy": "kv_deviation", "budget": 0.02, "reason": "it costs more"}]
    assert found["verdict"]["recommended"] is None
    assert "kl is" in found["verdict"]["failures"]["random at 0.2"][0]
    assert json.loads(report.to_json(None))["verdict"] is None


def test_table_has_a_row_a_variant(report: Report) -> None:
    console = Console(width=220, record=True, file=StringIO())
    console.print(rich_table(report))
    text = console.export_text()
    assert "fake, float32, passages cached behind the system prompt" in text
    assert text.count("random + key_shift") == 2
    assert "KL / KL of random" in text
    assert "1.00 (1.00 – 1.00)" in text
    assert "10 tasks (generated)" in text


@pytest.mark.skipif(not can_plot(), reason="matplotlib is optional")
def test_plots(report: Report, tmp_path: Path) -> None:
    plot(report, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
