"""How many passages say the same."""

from __future__ import annotations

import random
from dataclasses import replace

from lmcache.evaluation.tasks import words
from lmcache.evaluation.tasks.draw import spread
from lmcache.evaluation.tasks.people import make_people, portraits
from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.tasks.world import SYSTEM, Size


def counting(rng: random.Random, seed: int, size: Size) -> Task:
    """Asks how many people play an instrument that at least one of them plays."""
    workplaces = [
        f"{name} {kind}"
        for name, kind in zip(
            spread(rng, words.PLACE_NAMES, size.num_passages), spread(rng, words.PLACES, size.num_passages), strict=True
        )
    ]
    people = make_people(rng, workplaces)
    shared, *others = rng.sample(words.INSTRUMENTS, len(words.INSTRUMENTS))
    count = rng.randint(1, len(people))
    instruments = [shared] * count + spread(rng, others, len(people) - count)
    people = [replace(person, instrument=instrument) for person, instrument in zip(people, instruments, strict=True)]
    passages = portraits(rng, people, size.passage_words)
    rng.shuffle(passages)
    question = f"Question: How many of the people in the texts play the {shared}? Answer with a number."
    return Task("counting", seed, SYSTEM, tuple(passages), question, str(count))
