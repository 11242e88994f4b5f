"""``Task``: a prompt of several passages, as data."""

from __future__ import annotations

import msgspec


class Task(msgspec.Struct, frozen=True):
    """The prompt is ``system``, ``passages`` in this order, ``question``; each is tokenised by itself.

    Attributes:
        kind: which generator made it, or "file".
        seed: makes the same task again; the line of a file.
        system: instructions ahead of the passages; may be empty.
        passages: texts without a blank line at the end (the prompt adds it).
        question: what to do with the passages.
        answer: what a right answer contains; None when no short answer is right.
    """

    kind: str
    seed: int
    system: str
    passages: tuple[str, ...]
    question: str
    answer: str | None = None
