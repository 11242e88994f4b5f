"""A summary to go on with."""

from __future__ import annotations

import random

from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.tasks.world import SYSTEM, Size, people_and_places, shuffled_passages


def summary(rng: random.Random, seed: int, size: Size) -> Task:
    """Gives the beginning of a summary of all passages; no short answer is the right one."""
    people, places = people_and_places(rng, size)
    person, place = rng.choice(people), rng.choice(places)
    begun = rng.choice(
        [
            f"The texts introduce several people and places. {person.name}, a {person.job} from {person.town},",
            f"Among the places described is the {place.name} in {place.town},",
            f"{person.name} works at the {person.workplace},",
        ]
    )
    question = f"Task: Go on with this summary of the texts, without repeating its beginning: {begun}"
    return Task("summary", seed, SYSTEM, shuffled_passages(rng, size, people, places), question)
