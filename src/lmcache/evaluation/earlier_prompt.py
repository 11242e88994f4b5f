"""Where passages stood when they were cached: what the blend has to make up for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, Literal, get_args

from lmcache.evaluation.prompt_parts import PromptParts

Context = Literal["alone", "system", "prompt", "prefix"]
CONTEXTS: Final[tuple[str, ...]] = get_args(Context)


def tokens_before(context: Context, parts: PromptParts, foreign: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The tokens that stood before each passage of ``parts`` when its KV was computed.

    "alone": none. "system": the system part. "prompt": the system part and an earlier prompt's passages, that is these
    ones in another order, with one of ``foreign`` (of another task) ahead of every second of them. "prefix": what
    stands before it in this very prompt, so that all of it is reused as a prefix is.
    """
    if context == "alone":
        return [[] for _ in parts.passage_ids]
    if context == "prefix":
        ends = accumulate(parts.passage_ids, lambda before, passage: before + passage, initial=parts.system_ids)
        return [list(before) for before, _ in zip(ends, parts.passage_ids, strict=False)]
    if context == "system":
        return [list(parts.system_ids) for _ in parts.passage_ids]
    order = list(range(len(parts.passage_ids)))
    random.Random(len(order)).shuffle(order)
    others = iter(foreign)
    before = [*parts.system_ids]
    found: list[list[int]] = [[] for _ in order]
    for at, passage in enumerate(order):
        if at % 2 == 0:
            before += next(others, ())
        found[passage] = list(before)
        before += parts.passage_ids[passage]
    return found
