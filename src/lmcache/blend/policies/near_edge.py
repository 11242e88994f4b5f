"""What ``sink`` and ``boundary`` share: the tokens nearest to an edge of their passage."""

from __future__ import annotations

from abc import abstractmethod

import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.policies.undecided import computed_whole
from lmcache.blend.selection import SelectionContext


class NearEdgePolicy(SelectionPolicy):
    """Chooses the tokens nearest to an edge of their passage.

    With a fixed number of tokens an edge the ratio plays no part, unless it is 1. With None the ratio's budget is
    spread evenly over the edges; what a short passage cannot take goes to the others.
    """

    option: str

    def __init__(self, tokens: int | None) -> None:
        if tokens is not None and tokens < 1:
            raise ValueError(
                f"{self.option}={tokens}: must be at least 1, or None to spread the ratio's budget over the passages"
            )
        self._tokens = tokens

    @abstractmethod
    def distance(self, context: SelectionContext) -> torch.Tensor:
        """How many tokens of its passage lie between each row and the edge, int64 ``[N]``; outside of spans ``N``."""

    def select(self, context: SelectionContext) -> torch.Tensor:
        distance = self.distance(context)
        if self._tokens is None:
            return context.choose(-distance)
        return computed_whole(context) | (context.reusable & (distance < self._tokens))


def distance_from_start(context: SelectionContext) -> torch.Tensor:
    """See :meth:`NearEdgePolicy.distance`, with the start of a passage as the edge."""
    distance = torch.full((context.num_rows,), context.num_rows)
    for start, end in context.spans:
        distance[start:end] = torch.arange(end - start)
    return distance


def distance_from_ends(context: SelectionContext) -> torch.Tensor:
    """See :meth:`NearEdgePolicy.distance`, with both ends of a passage as edges."""
    distance = distance_from_start(context)
    for start, end in context.spans:
        distance[start:end] = torch.minimum(distance[start:end], distance[start:end].flip(0))
    return distance
