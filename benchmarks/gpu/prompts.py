"""Prompts of random token ids: documents behind a system prompt, then a question."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.gpu.setup import Setup

SYSTEM_TOKENS, QUESTION_TOKENS = 48, 32

Tokens = list[int]


class Prompts:
    """Equal seeds give equal prompts in every variant."""

    def __init__(self, setup: Setup, seed: int | str = 0) -> None:
        self._random = random.Random(seed)
        self._vocabulary = range(100, int(setup.shape["vocab_size"]) - 300)
        self.system = self.tokens(SYSTEM_TOKENS)

    def tokens(self, count: int) -> Tokens:
        """Never seen before."""
        return self._random.choices(self._vocabulary, k=count)

    def documents(self, count: int, length: int) -> list[Tokens]:
        return [self.tokens(length) for _ in range(count)]

    def over(self, documents: Sequence[Tokens], count: int) -> Tokens:
        """A new question over ``count`` of ``documents``, in any order."""
        chosen = self._random.sample(list(documents), count)
        return [*self.system, *(token for document in chosen for token in document), *self.tokens(QUESTION_TOKENS)]

    def gaps(self, rate: float, count: int) -> list[float]:
        """Seconds between arrivals of a Poisson stream of ``rate`` a second."""
        return [self._random.expovariate(rate) for _ in range(count)]
