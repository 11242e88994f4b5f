"""A fact that one passage states."""

from __future__ import annotations

import random

from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.tasks.world import SYSTEM, Size, people_and_places, shuffled_passages


def single_fact(rng: random.Random, seed: int, size: Size) -> Task:
    """Asks for one property of one person or place."""
    people, places = people_and_places(rng, size)
    person, place = rng.choice(people), rng.choice(places)
    question, answer = rng.choice(
        [
            (f"Which town does {person.name} come from?", person.town),
            (f"What is the profession of {person.name}?", person.job),
            (f"Which instrument does {person.name} play?", person.instrument),
            (f"Where does {person.name} work?", person.workplace),
            (f"In which town is the {place.name}?", place.town),
            (f"In which year was the {place.name} opened?", str(place.year)),
            (f"Who founded the {place.name}?", place.founder),
        ]
    )
    passages = shuffled_passages(rng, size, people, places)
    return Task("single_fact", seed, SYSTEM, passages, f"Question: {question}", answer)
