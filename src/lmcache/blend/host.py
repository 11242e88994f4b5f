"""What CacheBlend asks of a host: run its own model on chosen tokens, with our attention in place of its own.

Nothing of the model is ours: no embedding, norm, MLP, expert, residual or collective. A host calls ``attend`` once a
layer; everything of CacheBlend happens there.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

import torch

Output_co = TypeVar("Output_co", covariant=True)


class Attend(Protocol):
    """Attention of one layer over the whole batch, for the rows of one forward."""

    def __call__(
        self,
        layer_id: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Layers come in order, 0 to ``num_layers - 1``, in every forward.

        Args:
            q: ``[n, query_heads, dim]`` of the forward's rows, rotated to their positions.
            k: ``[n, kv_heads, dim]``, rotated; ``v``: ``[n, kv_heads, value_dim]``.
            scale: of the scores, before the soft cap.
            sliding_window: a query sees itself and the ``sliding_window - 1`` positions before it; None: all of them.
            softcap: scores become ``softcap · tanh(score / softcap)``.
            sinks: ``[query_heads]``, a logit for each head that takes part in the softmax and has no value.
            out: a place for the outcome, which spares a copy where it can be used; see :func:`have_in_place`.

        Returns:
            ``[n, query_heads, value_dim]`` in the dtype of ``q``.

        Raises:
            StopForward: nothing further is wanted of this forward. The host lets it pass.
        """


def have_in_place(attended: torch.Tensor, out: torch.Tensor) -> None:
    """Copy what :class:`Attend` has returned to ``out``, unless it lies there."""
    if attended.data_ptr() != out.data_ptr():
        out.copy_(attended)


class StopForward(Exception):
    """Ends a forward in the middle of the model, on purpose. Hosts must not swallow it."""


class ShardedHost(Protocol):
    """A host that holds some of the model's heads; other ranks run the same blend with the others."""

    def agreed_scores(self, scores: torch.Tensor, heads: Literal["mean", "max"]) -> torch.Tensor:
        """``scores`` (float32 ``[N]``) of this rank's heads and those of all others, the same in every rank, up to a
        factor. Every rank calls it at the same point of a blend."""


class BlendHost(Protocol[Output_co]):
    """A model that can compute chosen tokens of a batch of prompts. It holds the token ids."""

    @property
    def num_layers(self) -> int: ...

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, attend: Attend) -> Output_co:
        """Run the whole model on some rows.

        Args:
            rows: int64 ``[n]``, ascending: indices into the batch, its prompts one after the other.
            positions: int64 ``[n]``, the position of each row in its prompt. Not contiguous.
            attend: to be called in place of every layer's attention.

        Returns:
            What the host wants of the last row of each prompt (logits, say); the blend hands it through.
        """
