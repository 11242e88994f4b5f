"""Which came first: two dates from two passages, some of them told relative to a third."""

from __future__ import annotations

import random

from lmcache.evaluation.tasks.places import chronicles, make_places
from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.tasks.world import SYSTEM, Size

_RELATIVE_SHARE = 0.3


def ordering(rng: random.Random, seed: int, size: Size) -> Task:
    """Asks which of two places was opened first, or last."""
    places = make_places(rng, size.num_passages)
    # The first place keeps its year, so that every other date leads back to one.
    relative = {place: places[0] for place in places[1:] if rng.random() < _RELATIVE_SHARE}
    passages = chronicles(rng, places, size.passage_words, dated_by=relative)
    rng.shuffle(passages)
    one, other = rng.sample(places, 2)
    extreme, word = rng.choice([(min, "first"), (max, "last")])
    answer = extreme(one, other, key=lambda place: place.year).name
    question = f"Question: Which was opened {word}, the {one.name} or the {other.name}?"
    return Task("ordering", seed, SYSTEM, tuple(passages), question, answer)
