"""Long lists of numbers as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def int_tensor(numbers: Sequence[int] | npt.NDArray[np.integer] | torch.Tensor) -> torch.Tensor:
    """int64, on the CPU, in memory of its own. ``torch.tensor`` reads a list one eighth as fast: 4 ms for 32,768
    numbers."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))
