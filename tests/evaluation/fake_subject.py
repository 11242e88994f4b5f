"""A subject without a model: characters are tokens, and quality grows with the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lmcache.evaluation.prompt_parts import PromptParts
from lmcache.evaluation.rows import Settings
from lmcache.evaluation.runs import Answer, BlendedAnswer
from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.variants import Variant

VOCAB = 128

SETTINGS = Settings(
    model="fake", weights="w", dtype="float32", context="system", answer_tokens=32, threads=1, processor="none",
    versions={}, code="c",
)  # fmt: skip


class FakeSubject:
    """Answers "yes, ANSWER" after a full prefill, and the beginning of that after a blend.

    Attributes:
        full_prefills, blends: how often each was asked for.
    """

    def __init__(self, *, answer: str = "yes, the cello", die_after: int | None = None) -> None:
        self.answer = answer
        self.die_after = die_after
        self.full_prefills = 0
        self.blends: list[Variant] = []
        self.before: list[Sequence[Sequence[int]]] = []

    def parts(self, task: Task) -> PromptParts:
        return PromptParts(_ids(task.system), tuple(_ids(passage) for passage in task.passages), _ids(task.question))

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def full_prefill(self, parts: PromptParts) -> Answer:
        self.full_prefills += 1
        return Answer(self._logits(1.0), _ids(self.answer), seconds=2.0)

    @contextmanager
    def blending(
        self, parts: PromptParts, before: Sequence[Sequence[int]]
    ) -> Iterator[Callable[[Sequence[Variant]], Iterator[BlendedAnswer]]]:
        self.before.append(before)
        yield self._blend

    def _blend(self, variants: Sequence[Variant]) -> Iterator[BlendedAnswer]:
        for variant in variants:
            if self.die_after is not None and len(self.blends) >= self.die_after:
                raise KeyboardInterrupt
            self.blends.append(variant)
            kept = round(len(self.answer) * variant.budget)
            yield BlendedAnswer(self._logits(variant.budget), _ids(self.answer[:kept]), 0.5, variant.budget, None)

    def _logits(self, budget: float) -> torch.Tensor:
        logits = torch.zeros(VOCAB)
        logits[7] = 5 * budget
        return logits


def _ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode("ascii", "replace"))
