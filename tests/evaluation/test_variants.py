from __future__ import annotations

from lmcache.evaluation.variants import NotRun, Variant, sweep


class _Plain:
    def ratio_for(self, charged_budget: float, num_layers: int) -> float:
        return charged_budget


class _LooksAtTwoLayers:
    def ratio_for(self, charged_budget: float, num_layers: int) -> float:
        return (charged_budget - 2 / num_layers) / (1 - 2 / num_layers)


def test_every_policy_with_every_corrector_and_budget_and_anchors_once() -> None:
    policies = {"none": _Plain(), "random": _Plain(), "full": _Plain()}
    variants, not_run = sweep(policies, ["none", "key_shift"], [0.1, 0.05, 0.1], 30)
    assert variants == [
        Variant("none", "none", 0.0, 0.0),
        Variant("random", "none", 0.05, 0.05),
        Variant("random", "none", 0.1, 0.1),
        Variant("random", "key_shift", 0.05, 0.05),
        Variant("random", "key_shift", 0.1, 0.1),
        Variant("full", "none", 1.0, 1.0),
    ]
    assert not_run == []


def test_budgets_are_charged_ones_and_too_small_ones_are_told() -> None:
    variants, not_run = sweep({"dear": _LooksAtTwoLayers()}, ["none", "shift"], [0.02, 0.15], 20)
    assert [variant.budget for variant in variants] == [0.15, 0.15]
    assert [round(variant.ratio, 4) for variant in variants] == [0.0556, 0.0556]
    assert not_run == [NotRun("dear", 0.02, "what the policy looks at before it chooses costs more")]
    assert str(not_run[0]) == "dear at 0.02: what the policy looks at before it chooses costs more"


def test_names() -> None:
    assert str(Variant("random", "none", 0.15, 0.15)) == "random at 0.15"
    assert str(Variant("random", "key_shift", 0.15, 0.15)) == "random + key_shift at 0.15"
    assert str(Variant("full", "none", 1.0, 1.0)) == "full"
