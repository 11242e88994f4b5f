"""``Variant``: one way to blend, a point of the sweep over policies, correctors and budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

import msgspec
from msgspec import structs

ANCHORS: Final = ("none", "full")
"""Policies that spend no budget, or all of it."""
NO_CORRECTOR: Final = "none"
RAW: Final = "raw"
"""The codec that changes nothing."""


class Priced(Protocol):
    """What the sweep needs of a :class:`lmcache.blend.policies.interface.SelectionPolicy`."""

    def ratio_for(self, charged_budget: float, num_layers: int) -> float:
        """The recompute ratio at which it is charged so much; negative when it cannot be that cheap."""


class Variant(msgspec.Struct, frozen=True):
    """``budget`` is the charged budget asked for, ``ratio`` the recompute ratio that spends it.

    For :data:`ANCHORS` both are 0 or 1. ``codec``: what the reused KV was packed by and unpacked again.
    """

    policy: str
    corrector: str
    budget: float
    ratio: float
    codec: str = RAW

    @property
    def label(self) -> str:
        """Policy, corrector and codec: what a line of the plot is about."""
        label = self.policy if self.corrector == NO_CORRECTOR else f"{self.policy} + {self.corrector}"
        return label if self.codec == RAW else f"{label}, {self.codec}"

    def __str__(self) -> str:
        return self.label if self.policy in ANCHORS else f"{self.label} at {self.budget:.3g}"


class NotRun(msgspec.Struct, frozen=True):
    """A point of the sweep that cannot be, and why."""

    policy: str
    budget: float
    reason: str

    def __str__(self) -> str:
        return f"{self.policy} at {self.budget:.3g}: {self.reason}"


def sweep(
    policies: Mapping[str, Priced],
    correctors: Sequence[str],
    budgets: Sequence[float],
    num_layers: int,
    codecs: Sequence[str] = (RAW,),
) -> tuple[list[Variant], list[NotRun]]:
    """All variants, codec by codec, policy by policy, budgets ascending; anchors once and without corrector, what
    computes everything with the first codec only."""
    first, not_run = _sweep(policies, correctors, budgets, num_layers)
    variants = [structs.replace(variant, codec=codecs[0]) for variant in first]
    for codec in codecs[1:]:
        variants += [structs.replace(variant, codec=codec) for variant in first if variant.policy != ANCHORS[1]]
    return variants, not_run


def _sweep(
    policies: Mapping[str, Priced], correctors: Sequence[str], budgets: Sequence[float], num_layers: int
) -> tuple[list[Variant], list[NotRun]]:
    variants: list[Variant] = []
    not_run: list[NotRun] = []
    for name, policy in policies.items():
        if name in ANCHORS:
            budget = float(ANCHORS.index(name))
            variants.append(Variant(name, NO_CORRECTOR, budget, ratio=budget))
            continue
        for corrector in correctors:
            variants += _affordable(name, policy, corrector, sorted(set(budgets)), num_layers)
        not_run += [
            NotRun(name, budget, "what the policy looks at before it chooses costs more")
            for budget in sorted(set(budgets))
            if policy.ratio_for(budget, num_layers) < 0
        ]
    return variants, not_run


def _affordable(
    name: str, policy: Priced, corrector: str, budgets: Sequence[float], num_layers: int
) -> Iterator[Variant]:
    for budget in budgets:
        ratio = policy.ratio_for(budget, num_layers)
        if ratio >= 0:
            yield Variant(name, corrector, budget, ratio)
