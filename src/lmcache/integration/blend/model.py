"""What is asked of a model that an engine has loaded, before it can be blended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from lmcache.blend.host import Attend


class UnsupportedModelError(ValueError):
    """This model, or the way it is served, cannot be blended. ``reason`` is short, for counts; the message is whole."""

    def __init__(self, model: object, reason: str) -> None:
        super().__init__(f"{type(model).__name__} cannot be blended: {reason}. Reuse of exact prefixes works as ever.")
        self.reason = reason


class EngineModel(Protocol):
    """``layers`` are the attention layers by the engine's names, in order; prompts have ``max_positions`` tokens at
    most."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def layers(self) -> Mapping[str, Any]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> object:
        """Run the model on ``input_ids`` ``[n]`` at ``positions`` ``[n]``, with ``attend`` in place of attention."""
