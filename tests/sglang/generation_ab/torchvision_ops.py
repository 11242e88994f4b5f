"""torchvision from a package registry is built for CUDA: beside a CPU torch its operators do not load, and its import
fails for want of two names. SGLang imports it; nothing here uses it."""

from __future__ import annotations

import torch

_library: list[torch.library.Library] = []


def define() -> None:
    """Give the two names a meaning. Before the import of torchvision; once."""
    if _library:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.append(library)
