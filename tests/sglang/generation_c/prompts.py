"""What the servers are asked. Plain English: the best next token is then well ahead, and rounding changes no text."""

from __future__ import annotations

import random
from dataclasses import dataclass

_PLACES = ("harbour", "library", "mill", "station", "bakery", "tower", "school", "market", "bridge", "garden")
_FACTS = (
    "The {place} opens at {hour} o'clock in the morning.",
    "Its keeper is called {name}, and she has a dog.",
    "There are {number} steps in front of the {place}.",
    "Nobody may enter the {place} on Sundays.",
    "The oldest part of the {place} was built in {year}.",
    "From its roof one can see {number} villages.",
)
_NAMES = ("Anna", "Berta", "Clara", "Dora", "Emma", "Frieda", "Greta", "Hanna", "Ida", "Johanna")
_QUESTIONS = (
    "Question: When does it open? Answer:",
    "Question: Who is its keeper? Answer:",
    "Question: How many steps are there? Answer:",
    "Question: When was it built? Answer:",
)


def document(number: int, facts: int = 6) -> str:
    """About 15 tokens a fact."""
    place, name = _PLACES[number % 10], _NAMES[number * 3 % 10]
    lines = [
        fact.format(place=place, name=name, hour=5 + number % 6, number=10 + 7 * number, year=1500 + 13 * number)
        for fact in _FACTS[:facts]
    ]
    return f"Notes on the {place}, page {number}. " + " ".join(lines)


def question(number: int) -> str:
    return _QUESTIONS[number % len(_QUESTIONS)]


def ten_prompts() -> list[str]:
    """Which have nothing in common, so that each can be served cold first."""
    return [f"{document(number)} {question(number)}" for number in range(10)]


@dataclass(frozen=True)
class Asked:
    """A request of a storm; ``abort_after`` seconds, if it is."""

    prompt: str
    max_tokens: int
    salt: str | None
    abort_after: float | None
    wait: float


def storm(count: int, seed: int = 5) -> list[Asked]:
    """Requests on five documents in front of which they share parts of different lengths."""
    draw = random.Random(seed)
    return [
        Asked(
            prompt=f"{document(20 + draw.randrange(5), draw.randint(1, 6))} "
            f"{document(40 + draw.randrange(3), draw.randint(0, 2))} {question(draw.randrange(4))}",
            max_tokens=draw.randint(1, 6),
            salt=draw.choice([None, None, None, "tenant"]),
            abort_after=draw.choice([0.0, 0.05, 0.3, 1.0]) if draw.random() < 0.3 else None,
            wait=draw.random() * 0.2,
        )
        for _ in range(count)
    ]
