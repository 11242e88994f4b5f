"""The whole of an evaluation: plan to report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import torch

from lmcache.bench.machine import describe_machine
from lmcache.evaluation.blended import BlendedModel
from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.figures import summarise
from lmcache.evaluation.plan import Plan
from lmcache.evaluation.report import Report
from lmcache.evaluation.row_file import RowFile
from lmcache.evaluation.runs import make_prompts, run
from lmcache.evaluation.settings import settings_of
from lmcache.evaluation.variants import RAW, sweep
from lmcache.integration.transformers.loading import ModelLoadError, load_model

ANSWER_TOKENS: Final = 32


def evaluate(plan: Plan, out: Path, *, fresh: bool, follow: Callable[[Iterable[int], int], None]) -> Report:
    """Run ``plan``, with rows kept in directory ``out``.

    Args:
        fresh: begin again, whatever rows there are.
        follow: consumes the numbers of answers as they come, out of so many in all; a progress bar.

    Raises:
        EvaluationError: the model, or a row file, cannot be used.
        OSError: ``out`` cannot be written.
    """
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    machine = describe_machine()
    try:
        model, tokenizer = load_model(plan.model, plan.dtype, plan.device)
    except ModelLoadError as error:
        raise EvaluationError(str(error)) from error
    subject = BlendedModel(
        model, tokenizer, plan.policies, plan.correctors, answer_tokens=ANSWER_TOKENS, codecs=plan.codecs
    )
    variants, not_run = sweep(
        plan.policies, list(plan.correctors), plan.budgets, subject.num_layers, list(plan.codecs) or [RAW]
    )
    prompts = make_prompts(subject, plan.tasks, plan.context)
    settings = settings_of(
        plan.model.resolve().name,
        subject.identity,
        dtype=plan.dtype,
        device=plan.device,
        context=plan.context,
        answer_tokens=ANSWER_TOKENS,
    )
    digests = [prompt.digest for prompt in prompts]
    with RowFile(out, settings, fresh=fresh) as rows:
        follow(run(subject, prompts, variants, rows), len(prompts) * (1 + len(variants)))
        return Report(
            machine=machine,
            settings=settings,
            tasks=plan.tasks_from,
            seed=plan.seed,
            summary=summarise(rows, digests, variants, plan.seed),
            not_run=not_run,
            full_prefills=[rows.full[digest] for digest in digests],
            rows=[rows.blends[digest, variant] for digest in digests for variant in variants],
        )
