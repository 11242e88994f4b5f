"""What SGLang hands over with each load and store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lmcache.keys import Tokens


@dataclass(init=False)
class StoreMetadata:
    """A finished request whose KV may be kept.

    ``kv_indices`` are the slots of ``token_ids`` (int32 or int64 ``[T]``), all of them or those from ``offset`` on;
    the tokens before ``offset`` are left out. ``last_node`` is SGLang's own.
    """

    last_node: Any
    token_ids: Tokens
    kv_indices: torch.Tensor
    offset: int
    request_id: str | None = None

    def __init__(
        self,
        last_node: Any,
        token_ids: Tokens,
        kv_indices: torch.Tensor,
        offset: int,
        request_id: str | None = None,
        **_later: Any,
    ) -> None:
        """``_later``: what later versions of SGLang may add."""
        self.last_node = last_node
        self.token_ids = token_ids
        self.kv_indices = kv_indices
        self.offset = offset
        self.request_id = request_id


@dataclass(init=False)
class LoadMetadata:
    """A prompt whose KV is wanted.

    ``slot_mapping`` is int64 ``[T]``, −1 for the leading tokens that are in SGLang's pool already. ``offset`` is the
    number of these, rounded down to whole chunks; ``prefix_pad`` is what the rounding took off.
    """

    token_ids: Tokens
    slot_mapping: torch.Tensor
    offset: int
    prefix_pad: int = 0
    request_id: str | None = None

    def __init__(
        self,
        token_ids: Tokens,
        slot_mapping: torch.Tensor,
        offset: int,
        prefix_pad: int = 0,
        request_id: str | None = None,
        **_later: Any,
    ) -> None:
        """``_later``: what later versions of SGLang may add."""
        self.token_ids = token_ids
        self.slot_mapping = slot_mapping
        self.offset = offset
        self.prefix_pad = prefix_pad
        self.request_id = request_id
