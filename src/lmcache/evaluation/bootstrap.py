"""Bootstrap intervals over tasks, paired: every figure of a run is resampled with the same tasks."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 5_000
_PERCENTILES = (2.5, 97.5)


class Interval(msgspec.Struct, frozen=True):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class PairedBootstrap:
    """Percentile bootstrap over ``num_tasks`` tasks (Efron 1979): what would other tasks of these kinds have given?"""

    def __init__(self, num_tasks: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        # How often each task is drawn in each resample, [resamples, tasks].
        self._draws = generator.multinomial(num_tasks, np.full(num_tasks, 1 / num_tasks), size=_RESAMPLES)
        self._num_tasks = num_tasks

    def mean(self, values: Sequence[float]) -> Interval:
        """The mean of one value a task."""
        interval = self.ratio(values, np.ones(self._num_tasks))
        assert interval is not None
        return interval

    def ratio(
        self, numerators: Sequence[float] | NDArray[np.float64], denominators: Sequence[float] | NDArray[np.float64]
    ) -> Interval | None:
        """The ratio of two means, one value of each a task. None: the denominators are all zero."""
        above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
        if not below.any():
            return None
        resampled_below = self._draws @ below
        drawn = resampled_below != 0
        ratios = (self._draws @ above)[drawn] / resampled_below[drawn]
        low, high = np.percentile(ratios, _PERCENTILES)
        return Interval(float(above.sum() / below.sum()), float(low), float(high))
