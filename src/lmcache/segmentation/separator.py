"""Where a prompt is cut into the segments whose KV is kept and reused on its own."""

from __future__ import annotations

import torch


def cut_after_separator(tokens: torch.Tensor, separator: torch.Tensor) -> list[torch.Tensor]:
    """Cut after every occurrence of ``separator``, which so ends the segment that it closes.

    Occurrences may overlap: each of them cuts. What follows the last one is a segment too. No segment is empty, and
    one after the other they are ``tokens``.

    Args:
        tokens: integers ``[n]``, on any device.
        separator: integers ``[m]``, ``m ≥ 1``.

    Returns:
        Views of ``tokens``; none when ``n`` is 0.

    Raises:
        ValueError: either is not a row of integers, or ``separator`` is empty.
    """
    for name, row in (("tokens", tokens), ("separator", separator)):
        if row.dim() != 1 or row.dtype.is_floating_point or row.dtype.is_complex:
            raise ValueError(f"{name}: expected a row of integers, got {row.dtype} {list(row.shape)}")
    length = len(separator)
    if length == 0:
        raise ValueError("separator is empty: it must have at least one token")
    if len(tokens) < length:
        return [tokens] if len(tokens) else []
    windows = tokens.unfold(0, length, 1)  # [n − m + 1, m]
    ends = ((windows == separator.to(tokens.device)).all(dim=1).nonzero().squeeze(1) + length).tolist()
    starts = [0, *ends]
    return [tokens[start:end] for start, end in zip(starts, [*ends, len(tokens)], strict=True) if start < end]
