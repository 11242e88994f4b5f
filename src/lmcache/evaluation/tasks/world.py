"""Worlds: the people and places that the passages of one task are about, and what all tasks say alike."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from lmcache.evaluation.tasks.people import Person, make_people, portraits
from lmcache.evaluation.tasks.places import Place, chronicles, make_places

SYSTEM: Final = (
    "You are a careful assistant. Read the texts that the user gives you, and answer the question at the end with what "
    "the texts say. Keep the answer short."
)


@dataclass(frozen=True)
class Size:
    """How long a prompt is: about ``num_passages · passage_words · 1.3`` tokens."""

    num_passages: int = 6
    passage_words: int = 120

    def __post_init__(self) -> None:
        if not 2 <= self.num_passages <= 20:
            raise ValueError(f"num_passages={self.num_passages}: must be 2 … 20, the names do not reach further")
        if not 1 <= self.passage_words <= 300:
            raise ValueError(f"passage_words={self.passage_words}: must be 1 … 300, the sentences do not reach further")


def people_and_places(rng: random.Random, size: Size) -> tuple[list[Person], list[Place]]:
    """As many people as places (one person more if odd), ``size.num_passages`` together.

    Each person works at one of the places, and each but the first was taught by the one before.
    """
    places = make_places(rng, size.num_passages // 2)
    workplaces = [place.name for place in rng.sample(places, len(places))]
    if size.num_passages % 2:
        workplaces.append(rng.choice(workplaces))
    people = make_people(rng, workplaces)
    taught = [replace(person, teacher=teacher.name) for teacher, person in pairwise(people)]
    return [people[0], *taught], places


def shuffled_passages(rng: random.Random, size: Size, people: list[Person], places: list[Place]) -> tuple[str, ...]:
    """A portrait or chronicle of each, in random order."""
    passages = portraits(rng, people, size.passage_words) + chronicles(rng, places, size.passage_words)
    rng.shuffle(passages)
    return tuple(passages)
