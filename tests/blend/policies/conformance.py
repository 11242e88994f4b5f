"""What every selection policy must do. A policy's test class inherits this and says how to make it.

The property test over all of them stands in test_policies.py: hypothesis wants one function, not one a class.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from lmcache.blend.policies import make_policy, policy_names
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.selection import SelectionContext
from tests.blend.policies.batches import Prompt, context_of, probe_of

TWO_PASSAGES = Prompt((("exact", 3), ("moved", 10), ("new", 2), ("moved", 10), ("new", 3)), suffix=3)


class PolicyConformance:
    policy_name: ClassVar[str]
    options: ClassVar[dict[str, object]] = {}
    ratio_decides: ClassVar[bool] = True  # False: the ratio plays no part between 0 and 1

    @classmethod
    def make(cls) -> SelectionPolicy:
        return make_policy(cls.policy_name, **cls.options)

    @classmethod
    def select(cls, context: SelectionContext) -> torch.Tensor:
        return cls.make().select(context)

    @classmethod
    def check(cls, *prompts: Prompt) -> None:
        """Whatever the batch."""
        context = context_of(*prompts)
        masks = context.forced.clone(), context.reusable.clone()
        computed = cls.select(context)
        assert computed.dtype == torch.bool
        assert computed.shape == context.forced.shape
        assert torch.equal(masks[0], context.forced)
        assert torch.equal(masks[1], context.reusable)
        assert bool((computed | ~context.forced).all()), "a forced row is left out"
        assert not bool((computed & ~context.forced & ~context.reusable).any()), "an exact row is computed"
        assert torch.equal(cls.select(context_of(*prompts)), computed), "not deterministic"
        for prompt, (start, end) in zip(prompts, context.prompts, strict=True):
            part = slice(start, end)
            alone = context_of(prompt)
            assert torch.equal(cls.select(alone), computed[part]), "the rest of the batch plays a part"
            choice = context.reusable[part] & ~context.forced[part]
            chosen = int((computed[part] & choice).sum())
            if prompt.ratio == 1 and cls.policy_name != "none":
                assert chosen == int(choice.sum())
            elif cls.ratio_decides:
                budget = context.budget(int(context.reusable[part].sum()), prompt.ratio)
                assert chosen == min(budget, int(choice.sum()))

    def test_name(self) -> None:
        assert self.make().name == self.policy_name
        assert self.policy_name in policy_names()
        assert type(make_policy(self.policy_name.upper().replace("_", "-"))) is type(self.make())

    @pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 1.0])
    def test_two_passages(self, ratio: float) -> None:
        self.check(Prompt(TWO_PASSAGES.parts, 3, ratio))

    def test_prompts_of_a_batch_have_their_own_ratios(self) -> None:
        self.check(*(Prompt(TWO_PASSAGES.parts, 3, ratio) for ratio in (0.0, 0.3, 0.7, 1.0)))

    def test_nothing_to_reuse(self) -> None:
        self.check(Prompt((("new", 5),)))
        self.check(Prompt((("exact", 5),)))
        context = context_of(Prompt((("exact", 2), ("new", 3))))
        self.select(context)
        assert probe_of(context).asked == []

    def test_a_prompt_that_reuses_nothing_beside_one_that_does(self) -> None:
        self.check(Prompt((("new", 5),)), TWO_PASSAGES, Prompt((("exact", 5),)))

    def test_passages_of_one_token(self) -> None:
        self.check(Prompt((("moved", 1), ("moved", 1), ("new", 1), ("moved", 1), ("new", 1)), ratio=0.4))

    def test_a_passage_that_reaches_into_the_forced_end(self) -> None:
        self.check(Prompt((("exact", 2), ("moved", 10)), suffix=4, ratio=0.5))
        self.check(Prompt((("moved", 3),), suffix=3, ratio=0.5))

    @pytest.mark.parametrize("ratio", [0.0, 1.0])
    def test_does_not_look_into_the_model_when_there_is_nothing_to_decide(self, ratio: float) -> None:
        context = context_of(Prompt(TWO_PASSAGES.parts, 3, ratio))
        self.select(context)
        assert probe_of(context).asked == []

    def test_the_whole_budget_stands_for_the_whole_ratio(self) -> None:
        assert self.make().ratio_for(1.0, 10) == pytest.approx(1.0)
