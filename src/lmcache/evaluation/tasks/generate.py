"""All kinds of tasks, and tasks of them in turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from lmcache.evaluation.tasks.counting import counting
from lmcache.evaluation.tasks.ordering import ordering
from lmcache.evaluation.tasks.single_fact import single_fact
from lmcache.evaluation.tasks.summary import summary
from lmcache.evaluation.tasks.task import Task
from lmcache.evaluation.tasks.two_hop import two_hop
from lmcache.evaluation.tasks.world import Size

KINDS: Final[Mapping[str, Callable[[random.Random, int, Size], Task]]] = {
    "single_fact": single_fact,
    "two_hop": two_hop,
    "ordering": ordering,
    "counting": counting,
    "summary": summary,
}


def generate_task(kind: str, seed: int, size: Size = Size()) -> Task:  # noqa: B008 - frozen
    """The same task for the same arguments, on every machine and Python version.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of task: choose from {', '.join(KINDS)}")
    return KINDS[kind](random.Random(f"{kind}:{seed}"), seed, size)


def generate_tasks(
    count: int,
    seed: int = 0,
    kinds: Sequence[str] = tuple(KINDS),
    size: Size = Size(),  # noqa: B008 - frozen
) -> list[Task]:
    """``count`` tasks, the kinds in turn. More of them start with the same ones; different seeds share none.

    Raises:
        ValueError: there is no such kind, or no kind at all, or ``count`` is negative.
    """
    if count < 0 or not kinds:
        raise ValueError(f"count={count}, kinds={list(kinds)}: needs a count that is not negative, and a kind")
    return [generate_task(kinds[at % len(kinds)], seed * 1_000_000 + at // len(kinds), size) for at in range(count)]
