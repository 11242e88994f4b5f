"""A selection policy: which reused tokens are computed afresh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from lmcache.blend.selection import SelectionContext


class SelectionPolicy(ABC):
    """Chooses for a batch at a time. Stateless, deterministic; options are constructor arguments."""

    name: ClassVar[str]

    @abstractmethod
    def select(self, context: SelectionContext) -> torch.Tensor:
        """The rows to compute afresh, bool ``[N]``: all of ``context.forced`` and some of ``context.reusable``.

        A ratio of 1 selects every reusable row. Scores become rows through :meth:`SelectionContext.choose`, so that
        ties break the same way everywhere.
        """

    def ratio_for(self, charged_budget: float, num_layers: int) -> float:
        """The recompute ratio at which this policy is charged ``charged_budget`` of the reused tokens' QKV.

        Negative when the policy cannot be that cheap: what it looks at before it chooses costs more.
        """
        return charged_budget
