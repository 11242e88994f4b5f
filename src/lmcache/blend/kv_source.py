"""Where the KV of a reused passage comes from."""

from __future__ import annotations

from typing import Protocol

import torch


class KVLoadError(Exception):
    """A passage's KV cannot be had (any more): the blend falls back to a full prefill."""


class KVSource(Protocol):
    """The KV of one passage as it was stored, a layer at a time."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def length(self) -> int:
        """Tokens of the prompt in which it was computed: the frequencies of some scaled RoPE depend on it."""

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[num_tokens, kv_heads, dim]``, rotated to the positions at which it was computed, and V. Read-only.

        Waits until the layer has arrived. May be called several times for a layer, and for layers in any order.

        Raises:
            KVLoadError: the layer will not arrive.
        """


class DirectSource(KVSource, Protocol):
    """A source that saves a copy where it can."""

    def copy_into(self, layer_id: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Write the tokens from ``start`` on into ``keys`` and ``values``, as many as these have room for.

        False: it cannot do that here, and nothing was written; :meth:`layer` tells why, or does it.
        """


class PrefetchingSource(KVSource, Protocol):
    """A source that is told which layer will be wanted next."""

    def prefetch(self, layer_id: int) -> None:
        """Start to bring ``layer_id``, if that takes time. Must neither wait nor raise."""
