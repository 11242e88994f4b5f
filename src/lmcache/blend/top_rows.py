"""The one place that decides which rows have the highest scores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_KNOWN_TO_NUMPY = (torch.float32, torch.float64, torch.int32, torch.int64)


def top_rows(scores: torch.Tensor, count: int, eligible: torch.Tensor | None = None) -> torch.Tensor:
    """The rows with the highest scores, in ascending order of row.

    Of equal scores the lower row wins, and NaN is lower than every number, −inf included. So equal scores give the same
    rows on every device and in every process.

    Args:
        scores: ``[n]``, of any real dtype, on any device.
        count: how many rows to choose; if fewer are eligible, all of those.
        eligible: bool ``[n]``, the rows to choose from; None for all.

    Returns:
        int64 ``[min(count, eligible rows)]``, on the device of ``scores``.

    Raises:
        ValueError: ``scores`` is not one-dimensional, ``eligible`` is not bool of the same shape, or ``count`` is
            negative.
    """
    if scores.dim() != 1:
        raise ValueError(f"scores: expected [n], one score a row, got {list(scores.shape)}")
    if count < 0:
        raise ValueError(f"count={count}: must not be negative")
    if eligible is None:
        eligible = torch.ones_like(scores, dtype=torch.bool)
    elif eligible.dtype != torch.bool or eligible.shape != scores.shape:
        raise ValueError(
            f"eligible: expected bool {list(scores.shape)} as scores, got {eligible.dtype} {list(eligible.shape)}"
        )
    if scores.device.type == "cpu":
        plain = scores if scores.dtype in _KNOWN_TO_NUMPY else scores.double()
        return torch.from_numpy(_top_rows(plain.detach().numpy(), count, eligible.cpu().numpy()))
    rows = eligible.to(scores.device).nonzero().squeeze(1)
    count = min(count, len(rows))
    if not count:
        return rows[:0]
    candidates = scores[rows] + 0  # of bool, numbers
    missing = candidates.isnan()
    numbers = candidates[~missing]
    if count > len(numbers):
        chosen, tied = ~missing, missing
    else:
        last = numbers.kthvalue(len(numbers) - count + 1).values
        chosen, tied = candidates > last, candidates == last
    first_tied = tied.nonzero().squeeze(1)[: count - int(chosen.sum())]
    chosen[first_tied] = True
    return rows[chosen]


def _top_rows(scores: npt.NDArray[np.generic], count: int, eligible: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """:func:`top_rows` on the CPU, where a blend's GPU waits for it: half as long as with torch. To find the last that
    is chosen takes a sixth of the time of sorting."""
    rows: npt.NDArray[np.int64] = np.flatnonzero(eligible)
    count = min(count, len(rows))
    if not count:
        return rows[:0]
    candidates = scores[eligible]
    missing = np.isnan(candidates)
    numbers = candidates[~missing] if missing.any() else candidates
    if count > len(numbers):
        chosen, tied = ~missing, missing
    else:
        first = len(numbers) - count
        last = np.partition(numbers, first)[first]
        chosen, tied = candidates > last, candidates == last
    chosen[np.flatnonzero(tied)[: count - np.count_nonzero(chosen)]] = True
    best: npt.NDArray[np.int64] = rows[chosen]
    return best
