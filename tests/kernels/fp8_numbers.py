"""What fp8 pages make of numbers, by torch."""

from __future__ import annotations

import torch


def rounded(numbers: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Real ``numbers`` as stored: divided by ``scale``, saturated, rounded once."""
    largest = torch.finfo(dtype).max
    return (numbers.float() / scale).clamp(-largest, largest).to(dtype)


def real(stored: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """float32, or float64."""
    return (stored if stored.dtype == torch.float64 else stored.float()) * scale
