from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.measures import kl_divergence
from lmcache.evaluation.row_file import RowFile
from lmcache.evaluation.rows import Settings
from lmcache.evaluation.runs import make_prompts, run
from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.variants import Variant
from tests.evaluation.fake_subject import SETTINGS, FakeSubject

VARIANTS = [Variant("none", "none", 0.0, 0.0), *(Variant("random", "none", b, b) for b in (0.5, 1.0))]
TASKS = [
    Task("single_fact", 0, "System.", ("She plays the cello.", "He does not."), "What?", "cello"),
    Task("two_hop", 0, "System.", ("Another.", "One more."), "Who?", "nobody"),
    Task("summary", 0, "System.", ("A third.", "A fourth."), "Go on."),
]


@dataclass
class Run:
    """What a run left behind. ``steps`` is what it said of its progress."""

    subject: FakeSubject
    steps: list[int]
    rows: RowFile


def run_all(
    directory: Path,
    subject: FakeSubject | None = None,
    *,
    tasks: list[Task] = TASKS,
    variants: list[Variant] = VARIANTS,
    settings: Settings = SETTINGS,
    fresh: bool = False,
) -> Run:
    subject = subject or FakeSubject()
    with RowFile(directory, settings, fresh=fresh) as rows:
        return Run(subject, list(run(subject, make_prompts(subject, tasks, "system"), variants, rows)), rows)


def test_every_task_with_every_variant(tmp_path: Path) -> None:
    done = run_all(tmp_path)
    assert done.subject.full_prefills == 1 + len(TASKS)  # one to warm up
    assert done.subject.blends == VARIANTS * len(TASKS)
    assert sum(done.steps) == len(TASKS) * (1 + len(VARIANTS))
    assert [full.answered for full in done.rows.full.values()] == [True, False, None]
    assert [full.kind for full in done.rows.full.values()] == ["single_fact", "two_hop", "summary"]
    first, *_ = done.rows.full
    none, half, full = (done.rows.blends[first, variant] for variant in VARIANTS)
    assert (none.agreement, none.answered, none.tokens) == (0.0, False, ())
    assert (half.agreement, half.answered, half.charged_budget) == (7 / 14, False, 0.5)
    assert (full.agreement, full.answered, full.kl) == (1.0, True, 0.0)
    subject = FakeSubject()
    assert half.kl == kl_divergence(subject._logits(1.0), subject._logits(0.5))
    assert done.subject.before[0] == [list(b"System.")] * 2


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = run_all(tmp_path / "whole")
    dying = FakeSubject(die_after=4)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "killed", dying)
    again = run_all(tmp_path / "killed")
    assert [*dying.blends, *again.subject.blends] == VARIANTS * len(TASKS)
    assert sum(again.steps) == sum(whole.steps)
    assert again.rows.blends == whole.rows.blends
    assert again.rows.path.read_bytes() == whole.rows.path.read_bytes()
    assert run_all(tmp_path / "killed").subject.full_prefills == 0


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_is_run_again(tmp_path: Path, cut: int) -> None:
    whole = run_all(tmp_path)
    content = whole.rows.path.read_bytes()
    whole.rows.path.write_bytes(content[:-cut])
    again = run_all(tmp_path)
    assert again.subject.blends == VARIANTS[-1:]
    assert again.rows.path.read_bytes() == content


def test_more_tasks_and_variants_add_to_what_is_there(tmp_path: Path) -> None:
    run_all(tmp_path, tasks=TASKS[:2], variants=VARIANTS[:2])
    more = run_all(tmp_path)
    assert more.subject.blends == [VARIANTS[2], VARIANTS[2], *VARIANTS]


def test_other_settings_and_prompts_are_not_mixed_in(tmp_path: Path) -> None:
    run_all(tmp_path)
    other_settings = run_all(tmp_path, settings=msgspec.structs.replace(SETTINGS, dtype="bfloat16"))
    assert other_settings.subject.blends == VARIANTS * len(TASKS)
    changed = msgspec.structs.replace(TASKS[0], question="Where?")
    assert run_all(tmp_path, tasks=[changed, *TASKS[1:]]).subject.blends == VARIANTS
    other_answer = msgspec.structs.replace(TASKS[1], answer="cello")
    assert run_all(tmp_path, tasks=[TASKS[0], other_answer]).subject.blends == VARIANTS


def test_fresh_begins_again(tmp_path: Path) -> None:
    run_all(tmp_path)
    assert run_all(tmp_path, fresh=True).subject.blends == VARIANTS * len(TASKS)


def test_refuses_a_damaged_file(tmp_path: Path) -> None:
    path = run_all(tmp_path).rows.path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[3:]]))
    with pytest.raises(EvaluationError, match=r":3: .*; remove the line, or pass --fresh"):
        run_all(tmp_path)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(EvaluationError, match=":1: other settings than the name of the file says"):
        run_all(tmp_path)


def test_refuses_a_file_that_another_run_writes(tmp_path: Path) -> None:
    with RowFile(tmp_path, SETTINGS), pytest.raises(EvaluationError, match="being written by another run"):
        RowFile(tmp_path, SETTINGS, fresh=True)


def test_the_first_tasks_stand_in_the_same_earlier_prompt_however_many_there_are() -> None:
    subject = FakeSubject()
    three = make_prompts(subject, TASKS, "prompt")
    assert make_prompts(subject, TASKS[:2], "prompt") == three[:2]
    assert all(prompt.before != make_prompts(subject, TASKS, "system")[0].before for prompt in three)
    assert len(make_prompts(subject, TASKS[:1], "prompt")) == 1
