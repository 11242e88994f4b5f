"""Sentences to a passage of about a given length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def write_passage(rng: random.Random, lead: str, facts: Sequence[str], asides: Iterator[str], num_words: int) -> str:
    """``lead``, then all ``facts`` in any order among so many of the next ``asides`` that it has ``num_words`` words.

    Longer when lead and facts are, or by a part of the last aside. No aside comes twice; ``asides`` must not end.
    """
    body = list(facts)
    length = sum(len(sentence.split()) for sentence in (lead, *facts))
    while length < num_words:
        aside = next(asides)
        if aside not in body:
            body.append(aside)
            length += len(aside.split())
    rng.shuffle(body)
    return " ".join([lead, *body])
