from __future__ import annotations

from pathlib import Path

import pytest

from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.task_file import read_task_file
from lmcache.evaluation.tasks.task import Task

GOOD = '{"passages": ["One.", "Two."], "question": "Which?"}'


def test_reads_tasks_and_skips_empty_lines(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(
        f'{GOOD}\n\n{{"system": "Be kind.", "passages": ["Drei\u2028Vier"], "question": "?", "answer": "3"}}',
        encoding="utf-8",
    )
    assert read_task_file(file) == [
        Task("file", 1, "", ("One.", "Two."), "Which?", None),
        Task("file", 3, "Be kind.", ("Drei\u2028Vier",), "?", "3"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: Input data was truncated"),
        ("[]", ":2: Expected `object`, got `array`"),
        ('{"passages": ["a"]}', ":2: Object missing required field `question`"),
        ('{"passages": "a", "question": "?"}', r":2: Expected `array`, got `str` - at `\$.passages`"),
        ('{"passages": ["a", 1], "question": "?"}', r":2: Expected `str`, got `int` - at `\$.passages\[1\]`"),
        ('{"passages": [], "question": "?"}', ":2: `passages` must be texts, at least one"),
        ('{"passages": [" "], "question": "?"}', ":2: `passages` must be texts, at least one, none of them empty"),
        ('{"passages": ["a"], "question": " "}', ":2: `question` is empty"),
        ('{"passages": ["a"], "question": "?", "answer": ""}', ":2: `answer` is empty: leave it out"),
        ('{"passages": ["a"], "question": "?", "anwser": "b"}', ":2: Object contains unknown field `anwser`"),
    ],
)
def test_names_the_line_that_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(EvaluationError, match=f"tasks.jsonl{message}"):
        read_task_file(file)


def test_refuses_a_file_without_tasks_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="has no task"):
        read_task_file(tmp_path / "empty.jsonl")
    with pytest.raises(EvaluationError, match=r"cannot read tasks from .*absent.jsonl"):
        read_task_file(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"passages": ["\xe9"]}')
    with pytest.raises(EvaluationError, match=r"cannot read tasks from .*latin.jsonl"):
        read_task_file(tmp_path / "latin.jsonl")
