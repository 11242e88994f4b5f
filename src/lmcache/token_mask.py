"""Which tokens of a call are meant: masks and slot mappings, checked."""

from __future__ import annotations

import torch


def first_wanted(mask: torch.Tensor | None, num_tokens: int) -> int:
    """Index of the first True of a mask that is a run of False, then of True; 0 without a mask.

    Raises:
        ValueError: another shape or dtype, or a False behind a True.
    """
    if mask is None:
        return 0
    if mask.dtype != torch.bool or tuple(mask.shape) != (num_tokens,):
        raise ValueError(f"mask must be bool of shape ({num_tokens},), got {mask.dtype} of shape {tuple(mask.shape)}")
    wanted = int(mask.sum())
    first = num_tokens - wanted
    if not bool(mask[first:].all()):
        raise ValueError("mask must be a run of False followed by a run of True")
    return first


def checked_slots(slot_mapping: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``slot_mapping`` when it is int64 ``[num_tokens]``.

    Raises:
        ValueError: it is not.
    """
    if slot_mapping.dtype != torch.int64 or tuple(slot_mapping.shape) != (num_tokens,):
        raise ValueError(
            f"slot_mapping must be int64 of shape ({num_tokens},), "
            f"got {slot_mapping.dtype} of shape {tuple(slot_mapping.shape)}"
        )
    return slot_mapping
