"""How much of a prompt passages cover, and whether that is enough to blend it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache.blend.find_passages import FoundPassages, HoldT, Range
from lmcache.blend.passage_lease import HeldPassage
from lmcache.config import LMCacheEngineConfig


class Declined(NamedTuple):
    """Why a prompt is not blended: ``reason`` is short, for counts, ``words`` are for people."""

    reason: str
    words: str


def choose_passages(
    found: FoundPassages[HoldT], exact_tokens: int, end: int, config: LMCacheEngineConfig
) -> list[HeldPassage] | Declined:
    """The passages to blend the tokens ``[exact_tokens, end)`` with."""
    passages = found.held(exact_tokens, end, config.blend_min_tokens)
    reused = int(np.count_nonzero(covered(passages, end)))
    # A few tokens behind an exact prefix, the end of a prompt asked again, say, are computed sooner than blended.
    if reused < config.blend_min_tokens:
        return Declined("no_passage", f"no known passage of {config.blend_min_tokens} tokens or more")
    if reused < config.blend_min_coverage * (end - exact_tokens):
        share = reused / (end - exact_tokens)
        return Declined(
            "coverage", f"{share:.0%} of the tokens are known, blend_min_coverage is {config.blend_min_coverage}"
        )
    return passages


def covered(passages: Sequence[HeldPassage], num_tokens: int) -> npt.NDArray[np.bool_]:
    """bool ``[num_tokens]``: the tokens that a passage has."""
    mask = np.zeros(num_tokens, bool)
    for passage in passages:
        mask[passage.start : passage.end] = True
    return mask


def holes(passages: Sequence[HeldPassage], exact_tokens: int, num_tokens: int) -> list[Range]:
    """Half-open ranges behind the exact tokens that no passage has."""
    free = ~covered(passages, num_tokens)
    free[:exact_tokens] = False
    edges = np.flatnonzero(np.diff(free, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
