"""The first public API of CacheBlend: a retriever finds the KV of a batch, an executor blends it layer by layer.

A caller that runs its model layer by layer asks the retriever's task for each layer's KV and hands it to the executor
together with its own q, k and v. A *batch* is the tokens of its requests one after the other; ``query_start_loc``
says where each begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass
class BlendRetrieverResult:
    """One layer of the KV that was found for a batch of ``N`` tokens.

    Attributes:
        k: all ``N`` tokens, those that were not found undefined; None when no token was found.
        v: likewise.
        valid_mask: integer ``[N]`` on the CPU, 1 where the token was found.
        original_positions: integer ``[N]`` on the device of K and V: the position at which the KV of a token was
            computed, counted from the beginning of its segment; 0 where it was not found.
    """

    k: torch.Tensor | None
    v: torch.Tensor | None
    valid_mask: torch.Tensor
    original_positions: torch.Tensor


class BlendRetrieverTask(ABC):
    """A retrieval that is under way."""

    @abstractmethod
    def result(self, layer_id: int) -> BlendRetrieverResult:
        """One layer, as long as the batch. Waits until it is there; a token that is not found is no error."""


class BlendRetriever(ABC):
    """Finds KV of any part of a prompt, wherever that part stood when its KV was computed."""

    @abstractmethod
    def new_request(self, input_tokens: torch.Tensor, query_start_loc: torch.Tensor) -> BlendRetrieverTask:
        """Begin to retrieve the KV of a batch, and return at once.

        Args:
            input_tokens: integers ``[N]``, the requests one after the other. May be overwritten after the call.
            query_start_loc: integers ``[requests + 1]``: 0, then where each request ends.

        Raises:
            ValueError: ``query_start_loc`` does not cover the tokens.
        """


@dataclass
class BlendOutput:
    """What the attention of one layer works with: few queries, all keys and values.

    Attributes:
        q: of the selected tokens.
        k: of all tokens of the batch, rotated to where they stand now.
        v: of all tokens of the batch.
        positions: ``[selected]``, of the tokens in ``q`` within their prompts.
        local_indices: int64 ``[selected]`` on the CPU: the tokens in ``q`` as indices into the batch.
        query_start_loc: ``[requests + 1]``, of ``q``, if this layer selected tokens; otherwise None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    local_indices: torch.Tensor
    query_start_loc: torch.Tensor | None


class BlendExecutor(ABC):
    """Blends retrieved KV with fresh KV. The host cuts its hidden states to the tokens that an executor selects."""

    @abstractmethod
    def blend(
        self,
        layer_id: int,
        retrieved_k: torch.Tensor,
        retrieved_v: torch.Tensor,
        valid_mask: torch.Tensor,
        original_positions: torch.Tensor,
        fresh_q: torch.Tensor,
        fresh_k: torch.Tensor,
        fresh_v: torch.Tensor,
        positions: torch.Tensor,
        query_start_loc: torch.Tensor,
        token_dim: int,
    ) -> BlendOutput:
        """Blend one layer. To be called once a layer, in order; layer 0 begins a new batch.

        Args:
            retrieved_k: the layer's K of all ``N`` tokens, as it was retrieved: rotated to ``original_positions``.
            retrieved_v: the layer's V of all ``N`` tokens.
            valid_mask: integer or bool ``[N]``, non-zero where the retrieved KV is valid.
            original_positions: integer ``[N]``.
            fresh_q: the host's q, rotated, of the tokens selected so far (``N`` at first).
            fresh_k: the host's k, rotated, of the same tokens.
            fresh_v: the host's v of the same tokens.
            positions: ``[len of fresh_q]``, of these tokens within their prompts.
            query_start_loc: integer ``[requests + 1]``, of all ``N`` tokens, in every layer.
            token_dim: the dimension of q, k and v, fresh and retrieved, that counts tokens: 0 for ``[N, hidden]`` or
                ``[N, heads, dim]``, 1 for ``[heads, N, dim]``.

        Raises:
            ValueError: a tensor is of another shape, or the layers come in another order.
        """
