"""A fact that takes two passages: one names what the other describes."""

from __future__ import annotations

import random

from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.tasks.world import SYSTEM, Size, people_and_places, shuffled_passages


def two_hop(rng: random.Random, seed: int, size: Size) -> Task:
    """Asks about the workplace, or the teacher, of a person."""
    people, places = people_and_places(rng, size)
    person = rng.choice(people)
    workplace = next(place for place in places if place.name == person.workplace)
    questions = [
        (f"In which town is the place where {person.name} works?", workplace.town),
        (f"In which year was the place opened where {person.name} works?", str(workplace.year)),
        (f"Who founded the place where {person.name} works?", workplace.founder),
    ]
    if len(people) > 1:
        at = rng.randrange(1, len(people))
        teacher, pupil = people[at - 1], people[at]
        questions += [
            (f"Which instrument does the teacher of {pupil.name} play?", teacher.instrument),
            (f"Which town does the teacher of {pupil.name} come from?", teacher.town),
            (f"Where does the teacher of {pupil.name} work?", teacher.workplace),
        ]
    question, answer = rng.choice(questions)
    passages = shuffled_passages(rng, size, people, places)
    return Task("two_hop", seed, SYSTEM, passages, f"Question: {question}", answer)
