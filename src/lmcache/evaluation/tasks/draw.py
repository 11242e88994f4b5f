"""Drawing from lists."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice


def endless(rng: random.Random, values: Sequence[str]) -> Iterator[str]:
    """All of ``values`` in random order, then all of them in another, and so on."""
    while True:
        yield from rng.sample(values, len(values))


def spread(rng: random.Random, values: Sequence[str], count: int) -> list[str]:
    """``count`` of ``values`` in random order; none twice before all were used."""
    return list(islice(endless(rng, values), count))
