"""CacheBlend one layer at a time, driven by a host that cuts its own hidden states (arXiv:2405.16444)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeAlias

import torch

from lmcache.blend.interfaces import BlendExecutor, BlendOutput
from lmcache.blend.request_spans import request_spans
from lmcache.blend.top_rows import top_rows
from lmcache.observability.logging import init_logger, log_limited

logger = init_logger(__name__)

CHECK_LAYER = 1

PositionalEncoder: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]"
"""``(positions int64 [N], q, k) -> (q, k)``."""


def mask_to_indices(mask: torch.Tensor) -> torch.Tensor:
    """int64 indices of the non-zero elements of a mask ``[n]``, ascending, on its device.

    Raises:
        ValueError: ``mask`` is not one-dimensional.
    """
    if mask.dim() != 1:
        raise ValueError(f"mask: expected [n], got {list(mask.shape)}")
    return mask.nonzero().squeeze(1)


def indices_to_mask(indices: torch.Tensor, size: int) -> torch.Tensor:
    """int64 ``[size]`` on the CPU: 1 at ``indices``, else 0.

    Raises:
        ValueError: an index is not within ``[0, size)``.
    """
    indices = indices.to("cpu", torch.int64)
    if bool(((indices < 0) | (indices >= size)).any()):
        raise ValueError(f"indices: must lie within [0, {size}), got {indices.min()} to {indices.max()}")
    mask = torch.zeros(size, dtype=torch.int64)
    mask[indices] = 1
    return mask


def create_index(ndims: int, target_dim: int, index: torch.Tensor) -> tuple[slice | torch.Tensor, ...]:
    """What to write between the brackets of an ``ndims``-dimensional tensor to get ``index`` along one dimension.

    Raises:
        ValueError: there is no dimension ``target_dim``.
    """
    if not -ndims <= target_dim < ndims:
        raise ValueError(f"target_dim={target_dim}: a tensor of {ndims} dimensions has none of that number")
    slices: list[slice | torch.Tensor] = [slice(None)] * ndims
    slices[target_dim] = index
    return tuple(slices)


class CacheBlendImpl(BlendExecutor):
    """Recomputes the tokens whose V at layer 1 is furthest from the retrieved one.

    - Layer 0 passes everything through.
    - Layer 1 selects, in each request, all tokens that were not found and of the ``n`` that were found the
      ``int(n · recompute_ratio)`` with the largest mean squared difference of V, in float32; of equal ones the first.
      It returns K and V fresh.
    - Above, K and V are the retrieved ones, K rotated to its new position, with the fresh rows of the selected
      tokens in their places; new memory, in the dtype and on the device of the fresh ones.

    No token is forced: those of the question are selected because nobody has their KV. With a ratio of 0 and every
    token found, none is selected.

    Remembers the selection of one batch, so each batch that is being computed needs an executor of its own. Not
    thread-safe.
    """

    def __init__(self, recompute_ratio: float) -> None:
        """Raises:
        ValueError: ``recompute_ratio`` is not within [0, 1].
        """
        if not 0.0 <= recompute_ratio <= 1.0:
            raise ValueError(f"recompute_ratio={recompute_ratio}: must lie between 0 and 1")
        self.recompute_ratio = recompute_ratio
        self._encode: PositionalEncoder | None = None
        self._decode: PositionalEncoder | None = None
        self._last_layer = -1
        self._requests: list[tuple[int, int]] = []
        self._rows = torch.empty(0, dtype=torch.int64)  # of the batch: those that the fresh tensors hold

    def set_positional_encoder(self, positional_encoder: PositionalEncoder) -> None:
        """Say how the model rotates keys: ``(positions, q, k) -> (q, k)``.

        Called for each layer above 1 with the output of the reverse encoder as ``k`` (all ``N`` tokens) and with
        positions 0, 1, … of each request, int64 ``[N]``. ``q`` only completes the signature: zeros in the shape of
        ``fresh_q``, but for ``N`` tokens; the q that comes back is not used. Both have dtype and device of the fresh
        tensors, as the rotary embedding of an engine expects, and may be changed in place. K is rounded twice, once by
        each encoder.
        """
        self._encode = positional_encoder

    def set_reverse_positional_encoder(self, reverse_positional_encoder: PositionalEncoder) -> None:
        """Say how that rotation is undone. Called with a copy of the retrieved K and with ``original_positions``."""
        self._decode = reverse_positional_encoder

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
        """See :meth:`BlendExecutor.blend`. What was retrieved for layer 0 is not looked at.

        Without both positional encoders K stays rotated as it was retrieved, with a warning: right only for segments
        that stand where they stood.
        """
        self._enter(layer_id, query_start_loc, fresh_q, token_dim)
        for name, fresh in (("fresh_q", fresh_q), ("fresh_k", fresh_k), ("fresh_v", fresh_v)):
            _expect_count(name, _num_tokens(name, fresh, token_dim), len(self._rows))
        _expect_vector("positions", positions, len(self._rows))
        if layer_id == 0:
            self._last_layer = layer_id
            return BlendOutput(fresh_q, fresh_k, fresh_v, positions, self._rows, None)

        _expect_like("retrieved_k", retrieved_k, fresh_k, token_dim, self._num_tokens)
        _expect_like("retrieved_v", retrieved_v, fresh_v, token_dim, self._num_tokens)
        _expect_vector("valid_mask", valid_mask, self._num_tokens)
        _expect_vector("original_positions", original_positions, self._num_tokens)
        if layer_id == CHECK_LAYER:
            self._rows = self._select(fresh_v, retrieved_v, valid_mask, token_dim)
            q = fresh_q[create_index(fresh_q.dim(), token_dim, self._rows.to(fresh_q.device))]
            positions = positions[self._rows.to(positions.device)]
            output = BlendOutput(q, fresh_k, fresh_v, positions, self._rows, self._starts().to(query_start_loc))
        else:
            moved_k = self._move(retrieved_k.to(fresh_k), original_positions, fresh_q, token_dim)
            rows = self._rows.to(fresh_k.device)
            k = moved_k.index_copy(token_dim, rows, fresh_k)
            v = retrieved_v.to(fresh_v).index_copy(token_dim, rows, fresh_v)
            output = BlendOutput(fresh_q, k, v, positions, self._rows, None)
        self._last_layer = layer_id
        return output

    @property
    def _num_tokens(self) -> int:
        return self._requests[-1][1]

    def _enter(self, layer_id: int, query_start_loc: torch.Tensor, fresh_q: torch.Tensor, token_dim: int) -> None:
        """Begin a batch, or go on with the one that was begun."""
        if layer_id == 0:
            self._last_layer = -1
        if layer_id <= self._last_layer or self._last_layer < CHECK_LAYER < layer_id:
            came = "first" if self._last_layer < 0 else f"after layer {self._last_layer}"
            raise ValueError(
                f"layer_id={layer_id} came {came}: layers must come in ascending order, with layer {CHECK_LAYER}; "
                "layer 0 begins a new batch"
            )
        if self._last_layer < 0:
            num_tokens = _num_tokens("fresh_q", fresh_q, token_dim)
            self._requests = request_spans(query_start_loc, num_tokens)
            self._rows = torch.arange(num_tokens)
        elif (requests := request_spans(query_start_loc, self._num_tokens)) != self._requests:
            raise ValueError(
                f"layer {layer_id} has the requests {requests}, layer {self._last_layer} had {self._requests}: "
                "query_start_loc must be that of the whole batch in every layer"
            )

    def _select(
        self, fresh_v: torch.Tensor, retrieved_v: torch.Tensor, valid_mask: torch.Tensor, token_dim: int
    ) -> torch.Tensor:
        """int64 ``[selected]``, CPU, ascending."""
        difference = fresh_v.float() - retrieved_v.to(fresh_v.device, torch.float32)
        deviation = difference.square().movedim(token_dim, 0).flatten(1).mean(1).cpu()  # [N]
        valid = valid_mask.cpu() != 0
        selected = ~valid
        for start, end in self._requests:
            budget = int(int(valid[start:end].sum()) * self.recompute_ratio)
            selected[start + top_rows(deviation[start:end], budget, valid[start:end])] = True
        return mask_to_indices(selected)

    def _starts(self) -> torch.Tensor:
        """``query_start_loc`` of the selected tokens, int64 on the CPU."""
        bounds = torch.tensor([0, *(end for _, end in self._requests)])
        return torch.searchsorted(self._rows, bounds)

    def _move(
        self, k: torch.Tensor, original_positions: torch.Tensor, fresh_q: torch.Tensor, token_dim: int
    ) -> torch.Tensor:
        """``k`` of all tokens, rotated from where they were computed to where they are; the argument is not changed."""
        if self._encode is None or self._decode is None:
            log_limited(
                logger,
                logging.WARNING,
                "blend-without-positional-encoders",
                "Blending without both positional encoders: keys stay rotated to where their segments were computed",
                interval=math.inf,
            )
            return k
        shape = list(fresh_q.shape)
        shape[token_dim] = self._num_tokens
        q = fresh_q.new_zeros(shape)
        positions = torch.cat([torch.arange(end - start) for start, end in self._requests]).to(k.device)
        _, moved = self._decode(original_positions.to(k.device, torch.int64), q, k.clone())
        _, moved = self._encode(positions, q, moved)
        if moved.shape != k.shape:
            raise ValueError(f"the positional encoders turned K {list(k.shape)} into {list(moved.shape)}")
        return moved.to(k)


def _num_tokens(name: str, tensor: torch.Tensor, token_dim: int) -> int:
    if tensor.dim() < 2 or not -tensor.dim() <= token_dim < tensor.dim():
        raise ValueError(
            f"{name}: expected two dimensions or more, with token_dim={token_dim} among them, got {list(tensor.shape)}"
        )
    return tensor.shape[token_dim]


def _expect_count(name: str, count: int, expected: int) -> None:
    if count != expected:
        raise ValueError(f"{name} has {count} tokens: expected {expected}, those that this layer computes")


def _expect_vector(name: str, vector: torch.Tensor, count: int) -> None:
    if tuple(vector.shape) != (count,):
        raise ValueError(f"{name}: expected [{count}], got {list(vector.shape)}")


def _expect_like(
    name: str, retrieved: torch.Tensor | None, fresh: torch.Tensor, token_dim: int, num_tokens: int
) -> None:
    """``retrieved`` must look like ``fresh``, but for all tokens of the batch."""
    if retrieved is None:
        raise ValueError(f"{name} is None: nothing was found, so there is nothing to blend; compute the whole batch")
    shape = list(fresh.shape)
    shape[token_dim] = num_tokens
    if list(retrieved.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, from the fresh {list(fresh.shape)}, got {list(retrieved.shape)}")
