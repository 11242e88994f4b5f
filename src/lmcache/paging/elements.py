"""Seeing KV as plain machine words: moves are then byte-exact for every dtype, NaN payloads and fp8 included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

# torch has no 16-byte integer. Moving one complex128 copies its 16 bytes as they are.
_WORDS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def same_size_word(dtype: torch.dtype) -> torch.dtype:
    """The word as wide as ``dtype``: any view can be seen as such words."""
    return _WORDS[dtype.itemsize]


def widest_word(views: Sequence[torch.Tensor]) -> torch.dtype:
    """The largest word of which every one of ``views`` can be made.

    Indexing costs by the element, so wide words move several times as fast as bf16 ones.
    """
    itemsize = views[0].itemsize
    for width, dtype in _WORDS.items():
        if width < itemsize:
            break
        if all(_divides(width, view) for view in views):
            return dtype
    return _WORDS[itemsize]


def _divides(width: int, view: torch.Tensor) -> bool:
    if view.stride(-1) != 1:
        return False
    counts = (view.storage_offset(), view.shape[-1], *view.stride()[:-1])
    return all(count * view.itemsize % width == 0 for count in counts)


def stack_layers(views: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view ``[L, …]`` over ``views``, equal in shape and strides; None unless they lie in one storage at equal
    distances. Copying all layers in one call then saves the cost of ``L`` small ones.
    """
    first = views[0]
    storage = first.untyped_storage().data_ptr()
    if any(view.untyped_storage().data_ptr() != storage for view in views):
        return None
    offsets = [view.storage_offset() for view in views]
    step = offsets[1] - offsets[0] if len(offsets) > 1 else 1
    if step <= 0 or any(b - a != step for a, b in pairwise(offsets)):
        return None
    return first.as_strided((len(views), *first.shape), (step, *first.stride()))
