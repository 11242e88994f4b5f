"""The user's own tasks: a JSONL file, one task a line."""

from __future__ import annotations

from pathlib import Path

import msgspec

from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.tasks.task import Task


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    passages: tuple[str, ...]
    question: str
    system: str = ""
    answer: str | None = None


def read_task_file(path: Path) -> list[Task]:
    """The tasks of ``path``: objects with ``passages``, ``question`` and, if wanted, ``system`` and ``answer``.

    Empty lines are skipped.

    Raises:
        EvaluationError: the file cannot be read, a line is no such object, or there is no task at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read tasks from {path}: {error}") from None
    tasks = [_task(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not tasks:
        raise EvaluationError(f"{path} has no task: write one JSON object a line, with passages and question")
    return tasks


def _task(line: str, path: Path, number: int) -> Task:
    try:
        found = msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise EvaluationError(f"{path}:{number}: {error}") from None
    if not found.passages or not all(passage.strip() for passage in found.passages):
        raise EvaluationError(f"{path}:{number}: `passages` must be texts, at least one, none of them empty")
    if not found.question.strip():
        raise EvaluationError(f"{path}:{number}: `question` is empty")
    if found.answer is not None and not found.answer.strip():
        raise EvaluationError(f"{path}:{number}: `answer` is empty: leave it out when no short answer is right")
    return Task("file", number, found.system, found.passages, found.question, found.answer)
