"""Shift K and V by what the recomputed tokens show, as a Gaussian process sees it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmcache.blend.correctors.interface import BatchedCorrector, LayerCorrection, RowCorrection, RowsAhead
from lmcache.blend.correctors.kriging_rows import Covariance, correct_pieces, preparation
from lmcache.blend.correctors.sampled_span import PieceLimits, SampledSpan, sampled_spans
from lmcache.blend.cpu_linear import linear

# What a token costs grows with the tokens recomputed in the same piece, so long passages are cut.
_LIMITS = PieceLimits(tokens=1024, fresh=128)


class KrigingCorrector(BatchedCorrector):
    """Predicts the change of each token that is not recomputed from those that are (kriging; Rasmussen and Williams,
    "Gaussian Processes for Machine Learning", 2006, eq. 2.25).

    Each element of K and V changes by a process of mean zero along its passage. The changes of two tokens at distance
    ``d``, whose moved keys differ by ``x`` in the mean square, have the covariance ::

        passage + local · exp(−(d / width)² / 2) + alike · exp(−x / (reach · variance of the keys))

    and each change has ``noise`` of its own. So recomputed tokens that stand close together, or are alike, count little
    more than one of them: those that draw attention are both, and are no fair sample of their passage. And tokens with
    keys alike change alike. A passage of more than 1,024 tokens, or with more than 128 recomputed ones, is corrected in
    pieces.

    Args:
        passage: variance of what the changes of a passage have in common.
        local: variance of what neighbours have in common besides; ``width`` is how far that reaches, in tokens.
        alike: variance of what tokens with like keys have in common; ``reach`` is how unlike they may be. 0: none.
        noise: variance of a token's own change.
    """

    name = "kriging"
    alike_in_layers = True

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
        for span in sampled_spans(layer, _LIMITS):
            self._correct(span)

    def preparation(self, ahead: RowsAhead) -> Callable[[int], None] | None:
        return preparation(ahead, self._constants, _LIMITS)

    def correct_rows(self, layer: RowCorrection) -> None:
        correct_pieces(layer, self._constants, _LIMITS)

    @property
    def _constants(self) -> Covariance:
        return Covariance(self._passage, self._local, self._width, self._alike, self._reach, self._noise)

    def _correct(self, span: SampledSpan) -> None:
        covariance = self._covariance(span)
        among_fresh = covariance[span.fresh]
        among_fresh.diagonal().add_(self._noise)
        # Positive noise makes it positive definite: nothing need be checked, and an accelerator not be waited for.
        factor, _ = torch.linalg.cholesky_ex(among_fresh)
        change = torch.cat([span.keys.change, span.values.change], dim=1)
        # The inverse is symmetric, so this is (inverse @ change)ᵀ.
        shift = linear(covariance, linear(change.T, torch.cholesky_inverse(factor)))
        width = span.keys.change.shape[1]
        span.keys.add(slice(None), shift[:, :width])
        span.values.add(slice(None), shift[:, width:])

    def _covariance(self, span: SampledSpan) -> torch.Tensor:
        """``[n, m]``, of every token with the recomputed ones; without noise."""
        nearness: torch.Tensor | None = span.memo.get(self)
        if nearness is None:
            nearness = span.memo[self] = self._nearness(span)
        if not self._alike:
            return nearness.clone()
        keys = span.keys.moved.flatten(1).to(nearness.dtype)
        keys = keys - keys.mean()
        squares = keys.square().mean(1)
        # Equal keys all over a passage have no variance; they are alike.
        unit = (self._reach * squares.mean()).clamp_min(1e-30)
        apart = squares / unit
        alike = linear(keys, keys[span.fresh] * (2 / (keys.shape[1] * unit)))
        alike.sub_(apart[:, None]).sub_(apart[span.fresh]).exp_()
        return alike.mul_(self._alike).add_(nearness)

    def _nearness(self, span: SampledSpan) -> torch.Tensor:
        """The part of the covariance that hangs on where tokens stand, the same in every layer."""
        distances = span.distances(slice(0, len(span.keys.moved)))
        exponent = -(distances / self._width).square() / 2
        # Further away it is zero to rounding; results too small for normal numbers take ten times as long.
        return self._passage + self._local * torch.exp(exponent.clamp_min_(-80))
