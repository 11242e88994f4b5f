"""The sweep: every task, with full prefill once and with every variant, as far as it was not run before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch
from blake3 import blake3

from lmcache.evaluation.earlier_prompt import Context, tokens_before
from lmcache.evaluation.measures import contains_answer, kl_divergence, token_agreement
from lmcache.evaluation.prompt_parts import PromptParts
from lmcache.evaluation.row_file import RowFile
from lmcache.evaluation.rows import BlendRow, FullPrefill
from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.variants import Variant


@dataclass(frozen=True)
class Answer:
    """``logits`` (float ``[vocab]``) of the first answer token, the greedy ``tokens``, ``seconds`` of the prefill."""

    logits: torch.Tensor
    tokens: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class BlendedAnswer(Answer):
    """``charged_budget`` as measured; ``fallback`` is why nothing was reused, if so; ``packed_ratio`` and
    ``packed_error`` are those of :class:`~lmcache.evaluation.rows.BlendRow`."""

    charged_budget: float
    fallback: str | None
    packed_ratio: float = 1.0
    packed_error: float = 0.0


class Subject(Protocol):
    """The model under evaluation."""

    def parts(self, task: Task) -> PromptParts:
        """The prompt of ``task``."""

    def text(self, tokens: Sequence[int]) -> str:
        """``tokens`` in words."""

    def full_prefill(self, parts: PromptParts) -> Answer:
        """The model's own answer."""

    def blending(
        self, parts: PromptParts, before: Sequence[Sequence[int]]
    ) -> AbstractContextManager[Callable[[Sequence[Variant]], Iterator[BlendedAnswer]]]:
        """Cache each passage behind the tokens ``before`` it. Inside, blend the prompt with all variants."""


@dataclass(frozen=True)
class Prompt:
    """A task, tokenised, and the tokens that stood before each of its passages when it was cached.

    ``digest`` names all of it in the rows.
    """

    task: Task
    parts: PromptParts
    before: list[list[int]]
    digest: str


def make_prompts(subject: Subject, tasks: Sequence[Task], context: Context) -> list[Prompt]:
    """The prompts of ``tasks``. Foreign passages come from the task before; for the first task, from the second."""
    all_parts = [subject.parts(task) for task in tasks]
    prompts = []
    for at, (task, parts) in enumerate(zip(tasks, all_parts, strict=True)):
        neighbours = all_parts[at - 1 : at] if at else all_parts[1:2]
        before = tokens_before(context, parts, neighbours[0].passage_ids if neighbours else ())
        digest = blake3(msgspec.json.encode((parts.prompt, task.answer, before))).hexdigest(8)
        prompts.append(Prompt(task, parts, before, digest))
    return prompts


def run(subject: Subject, prompts: Sequence[Prompt], variants: Sequence[Variant], rows: RowFile) -> Iterator[int]:
    """Run what ``rows`` lack, and append it there.

    Yields:
        how many answers have been added to what is done, those found in ``rows`` included:
        ``len(prompts) · (len(variants) + 1)`` in the end.
    """
    warm = False
    for prompt in prompts:
        missing = [variant for variant in variants if (prompt.digest, variant) not in rows.blends]
        if not missing and prompt.digest in rows.full:
            yield len(variants) + 1
            continue
        if not warm:  # a first prefill is slower: memory, threads, kernels
            subject.full_prefill(prompt.parts)
            warm = True
        reference = subject.full_prefill(prompt.parts)
        if prompt.digest not in rows.full:
            rows.append(_full_row(subject, prompt, reference))
        yield 1 + len(variants) - len(missing)
        with subject.blending(prompt.parts, prompt.before) as blend:
            for variant, answer in zip(missing, blend(missing), strict=True):
                rows.append(_blend_row(subject, prompt, variant, reference, answer))
                yield 1


def _full_row(subject: Subject, prompt: Prompt, answer: Answer) -> FullPrefill:
    text = subject.text(answer.tokens)
    return FullPrefill(
        task=prompt.digest,
        kind=prompt.task.kind,
        seed=prompt.task.seed,
        num_tokens=len(prompt.parts.input_ids),
        tokens=answer.tokens,
        text=text,
        answered=_answered(text, prompt.task),
        seconds=answer.seconds,
    )


def _blend_row(
    subject: Subject, prompt: Prompt, variant: Variant, reference: Answer, answer: BlendedAnswer
) -> BlendRow:
    return BlendRow(
        task=prompt.digest,
        variant=variant,
        charged_budget=answer.charged_budget,
        kl=kl_divergence(reference.logits, answer.logits),
        agreement=token_agreement(reference.tokens, answer.tokens),
        answered=_answered(subject.text(answer.tokens), prompt.task),
        tokens=answer.tokens,
        seconds=answer.seconds,
        fallback=answer.fallback,
        packed_ratio=answer.packed_ratio,
        packed_error=answer.packed_error,
    )


def _answered(text: str, task: Task) -> bool | None:
    return None if task.answer is None else contains_answer(text, task.answer)
