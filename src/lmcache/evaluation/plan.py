"""What to evaluate, from what the user wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from lmcache.blend.correctors import make_corrector
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.policies import POLICIES, make_policy
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.config import LMCacheEngineConfig
from lmcache.evaluation.earlier_prompt import CONTEXTS, Context
from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.spelled import items, make_all
from lmcache.evaluation.task_file import read_task_file
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.evaluation.tasks.task import Task
from lmcache.storage.codecs import make_codec
from lmcache.storage.codecs.interface import Codec


@dataclass(frozen=True)
class Plan:
    """``policies`` and ``correctors`` are by the names that rows and tables give them.

    ``tasks_from`` is in words where the tasks are from.
    """

    model: Path
    tasks: list[Task]
    tasks_from: str
    policies: dict[str, SelectionPolicy]
    correctors: dict[str, Corrector]
    budgets: list[float]
    context: Context
    dtype: str
    device: str
    seed: int
    threads: int | None
    codecs: dict[str, Codec] = field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        *,
        model: Path,
        num_tasks: int,
        tasks_file: Path | None,
        policies: str | None,
        correctors: str | None,
        budgets: str,
        context: str,
        dtype: str,
        device: str,
        seed: int,
        threads: int | None,
        codecs: str | None = None,
    ) -> Plan:
        """``policies``, ``correctors`` and ``budgets`` are comma-separated. None: all policies there are; no corrector
        and the default one. So are ``codecs``: with them, only the default policy and corrector, and what reuses
        everything; None: nothing is packed.

        Raises:
            EvaluationError: one of these is not what it must be.
        """
        if context not in CONTEXTS:
            raise EvaluationError(f"--context {context}: choose from {', '.join(CONTEXTS)}")
        if tasks_file is None:
            tasks, tasks_from = generate_tasks(num_tasks, seed), f"generated from seed {seed}"
        else:
            tasks, tasks_from = read_task_file(tasks_file), str(tasks_file)
        if codecs is not None:
            policies, correctors = policies or f"none,{_default_policy()}", correctors or _default_corrector()
        return cls(
            model=model,
            tasks=tasks,
            tasks_from=tasks_from,
            policies=make_all("--policies", policies or ",".join(POLICIES.names()), make_policy),
            correctors=make_all("--correctors", correctors or f"none,{_default_corrector()}", make_corrector),
            budgets=[_budget(item) for item in items("--budgets", budgets)],
            context=cast(Context, context),
            dtype=dtype,
            device=_device(device),
            seed=seed,
            threads=threads,
            codecs={} if codecs is None else {name: _codec(name) for name in items("--codec", codecs)},
        )


def _codec(name: str) -> Codec:
    try:
        return make_codec(name)
    except ValueError as error:
        raise EvaluationError(f"--codec: {error}") from None


def _default_policy() -> str:
    return LMCacheEngineConfig.from_defaults().blend_policy


def _default_corrector() -> str:
    return LMCacheEngineConfig.from_defaults().blend_corrector


def _budget(text: str) -> float:
    try:
        budget = float(text)
    except ValueError:
        raise EvaluationError(f"--budgets: {text!r} is not a number") from None
    if not 0 < budget <= 1:
        raise EvaluationError(
            f"--budgets: {text} must be above 0 and at most 1, it is a share of the reused tokens' QKV"
        )
    return budget


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name
