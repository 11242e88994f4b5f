"""Shift K and V by what the recomputed tokens show, as a Gaussian process sees it."""

from __future__ import annotations

import torch

from lmcache.blend.correctors.interface import Corrector, LayerCorrection
from lmcache.blend.correctors.sampled_span import SampledSpan, sampled_spans

# What a token costs grows with the tokens recomputed in the same piece, so long passages are cut.
_LONGEST = 1024


class KrigingCorrector(Corrector):
    """Predicts the change of each token that is not recomputed from those that are (kriging; Rasmussen and Williams,
    "Gaussian Processes for Machine Learning", 2006, eq. 2.25).

    Each element of K and V changes by a process of mean zero along its passage. The changes of two tokens at distance
    ``d``, whose moved keys differ by ``x`` in the mean square, have the covariance ::

        passage + local · exp(−(d / width)² / 2) + alike · exp(−x / (reach · variance of the keys))

    and each change has ``noise`` of its own. So recomputed tokens that stand close together, or are alike, count little
    more than one of them: those that draw attention are both, and are no fair sample of their passage. And tokens with
    keys alike change alike. A passage of more than 1,024 tokens is corrected in pieces.

    Args:
        passage: variance of what the changes of a passage have in common.
        local: variance of what neighbours have in common besides; ``width`` is how far that reaches, in tokens.
        alike: variance of what tokens with like keys have in common; ``reach`` is how unlike they may be. 0: none.
        noise: variance of a token's own change.
    """

    name = "kriging"

    def __init__(
        self,
        passage: float = 2.0,
        local: float = 0.3,
        width: float = 8.0,
        alike: float = 1.0,
        reach: float = 0.5,
        noise: float = 1.0,
    ) -> None:
        positive = (("passage", passage), ("width", width), ("reach", reach), ("noise", noise))
        for option, value in positive:
            if not value > 0:
                raise ValueError(f"{option}={value}: must be positive")
        for option, value in (("local", local), ("alike", alike)):
            if not value >= 0:
                raise ValueError(f"{option}={value}: must not be negative")
        self._passage = passage
        self._local = local
        self._width = width
        self._alike = alike
        self._reach = reach
        self._noise = noise

    def correct(self, layer: LayerCorrection) -> None:
        for span in sampled_spans(layer, _LONGEST):
            self._correct(span)

    def _correct(self, span: SampledSpan) -> None:
        dtype = span.keys.change.dtype
        keys = span.keys.moved.to(dtype).flatten(1)  # a copy: `add` changes the others
        spread = keys.var(correction=0) if self._alike else keys.new_zeros(())
        if not spread > 0:
            keys = keys[:, :0]
        known = keys[span.fresh]
        covariance = self._covariance(span.fresh[:, None] - span.fresh, known, known, spread)
        covariance.diagonal().add_(self._noise)
        # Positive noise makes it positive definite: nothing need be checked, and an accelerator not be waited for.
        factor, _ = torch.linalg.cholesky_ex(covariance)
        solved = [torch.cholesky_solve(tensor.change, factor) for tensor in (span.keys, span.values)]
        for tokens in span.blocks():
            weights = self._covariance(span.distances(tokens), keys[tokens], known, spread)
            for tensor, solution in zip((span.keys, span.values), solved, strict=True):
                tensor.add(tokens, weights @ solution)

    def _covariance(
        self, distances: torch.Tensor, keys: torch.Tensor, others: torch.Tensor, spread: torch.Tensor
    ) -> torch.Tensor:
        """``[n, m]`` of tokens with ``keys`` ``[n, kv_heads · dim]`` and ``others`` ``[m, …]``; without noise."""
        near = torch.exp(-(distances.to(keys.dtype) / self._width).square() / 2)
        covariance = self._passage + self._local * near
        if keys.shape[1]:
            apart = torch.cdist(keys, others).square() / keys.shape[1]
            covariance += self._alike * torch.exp(-apart / (self._reach * spread))
        return covariance
