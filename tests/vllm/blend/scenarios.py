"""What is done to small models in a real vLLM; see :mod:`tests.vllm.blend.harness`. Each gives an answer by model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lmcache.blend.batch import BlendPrompt
from lmcache.blend.blend_pass import BlendResult, blend
from lmcache.blend.correctors import make_corrector
from lmcache.blend.plan import BlendPlan, ReusedSpan
from lmcache.blend.policies import make_policy
from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.blend.ropes import find_ropes
from lmcache.integration.vllm.blend.host import VLLMHost, VLLMModel
from lmcache.integration.vllm.blend.model_finder import find_model
from tests.transformers.small_models import VOCAB, random_ids
from tests.vllm.blend.definition import Definition, Reused
from tests.vllm.blend.small_models import next_logprobs, serving
from tests.vllm.blend.step_connector import StepConnector

T = TypeVar("T")

BEFORE, SYSTEM, FIRST, SECOND, QUESTION = (random_ids(count, seed) for seed, count in enumerate((30, 11, 24, 37, 9)))
EARLIER = torch.cat([SYSTEM, FIRST, SECOND])
PROMPT = torch.cat([BEFORE, SYSTEM, SECOND, FIRST, QUESTION])
# Where the passages stand in PROMPT, and where they stood in EARLIER
SPANS = (ReusedSpan(41, 78, 0, old_start=35), ReusedSpan(78, 102, 1, old_start=11))


@dataclass(frozen=True)
class Held:
    """A :class:`lmcache.blend.kv_source.KVSource`: tokens of an earlier blend."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int

    @property
    def num_tokens(self) -> int:
        return len(self.keys[0])

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[layer_id], self.values[layer_id]

    @classmethod
    def of(cls, result: BlendResult[Any], start: int, end: int) -> Held:
        keys, values = ([x[start:end].clone() for x in tensors] for tensors in (result.keys, result.values))
        return cls(keys, values, len(result.keys[0]))


def in_a_step(llm: Any, job: Callable[[], T]) -> T:
    """Run ``job`` where a connector loads KV, in a step that must not notice."""
    answers: list[T] = []
    expected = next_logprobs(llm, QUESTION)
    StepConnector.job = lambda: answers.append(job())
    assert torch.equal(next_logprobs(llm, QUESTION), expected), "the step in which a blend ran went otherwise"
    (answer,) = answers
    return answer


class Blends:
    """Blends of PROMPT with what was computed for EARLIER, by one model."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.model = VLLMModel(StepConnector.model, llm.llm_engine.vllm_config)
        self.ropes = in_a_step(llm, lambda: find_ropes(self.model))
        self.earlier = self.run([EARLIER], [BlendPrompt(BlendPlan(len(EARLIER)))], "full")
        self.sources = [Held.of(self.earlier, 35, 72), Held.of(self.earlier, 11, 35)]
        self.reusing = BlendPrompt(BlendPlan(len(PROMPT), SPANS), self.sources, ratio=0.3)

    def run(
        self, prompts: list[torch.Tensor], planned: list[BlendPrompt], policy: str, *, rotate: bool = True
    ) -> BlendResult[torch.Tensor]:
        host = VLLMHost(self.model, prompts)
        ropes = self.ropes if rotate else [None] * len(self.ropes)
        made = make_policy(policy), make_corrector("none")
        return in_a_step(self.llm, lambda: blend(host, planned, ropes, *made))

    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.model.compute_logits(hidden)
        return logits[:, :VOCAB].log_softmax(-1)

    def defined(self, result: BlendResult[Any]) -> torch.Tensor:
        """Logprobs ``[1, vocab]`` of PROMPT by the definition, with the choice of ``result``."""
        (plan,) = result.plans
        kept = plan.reusable() & ~plan.forced()
        for start, end in plan.selected:
            kept[start:end] = False
        modules = dict(self.model.model.named_modules())
        rotary = [
            None if rope is None else modules[name.rpartition(".")[0]].rotary_emb
            for name, rope in zip(self.model.layers, self.ropes, strict=True)
        ]
        reused = [
            Reused(span.start, held.keys, held.values, span.start - span.old_start)
            for span, held in zip(SPANS, self.sources, strict=True)
        ]
        # kv_deviation has computed every token up to the layer at which it looks.
        definition = Definition(reused, kept, rotary, first_layer=2 if plan.policy == "kv_deviation" else 0)
        return self.logprobs(self.model.run(PROMPT, torch.arange(len(PROMPT)), definition)[-1:])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def blends(name: str) -> dict[str, Any]:
    """How far the logprobs of several blends are from what they should be, or should not be."""
    with serving(name) as llm:
        own = torch.stack([next_logprobs(llm, ids) for ids in (PROMPT, EARLIER)])
        made = Blends(llm)
        full = made.run([PROMPT, EARLIER], [made.reusing, BlendPrompt(BlendPlan(len(EARLIER)))], "full")
        sparse = {
            policy: made.run([PROMPT], [made.reusing], policy) for policy in ("none", "kv_deviation", "query_attention")
        }
        unrotated = made.run([PROMPT], [made.reusing], "none", rotate=False)
        results = [made.earlier, full, unrotated, *sparse.values()]
        return {
            "found_anywhere": find_model(next(iter(made.model.layers.values()))) is StepConnector.model,
            "rotated": [layer for layer, rope in enumerate(made.ropes) if rope is not None],
            "fallbacks": [reason for result in results for reason in result.fallbacks if reason],
            "nothing_cached": distance(made.logprobs(made.earlier.output), own[1:]),
            "full": distance(made.logprobs(full.output), own),
            "none": distance(made.logprobs(sparse["none"].output), own[:1]),
            "chosen": {policy: sum(b - a for a, b in result.plans[0].selected) for policy, result in sparse.items()},
            "from_definition": {
                policy: distance(made.logprobs(result.output), made.defined(result))
                for policy, result in sparse.items()
            },
            "unrotated_from_definition": distance(made.logprobs(unrotated.output), made.defined(unrotated)),
            "raised": raised(made),
        }


def raised(made: Blends) -> str:
    """What comes out of a forward whose ``attend`` raises."""

    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise KeyError("from attend")

    def job() -> str:
        try:
            made.model.run(PROMPT, torch.arange(len(PROMPT)), fail)
        except Exception as error:
            return repr(error)
        return "nothing"

    return in_a_step(made.llm, job)


def refusal(name: str) -> dict[str, Any]:
    """Why a model is not blended, if it is not. ``+lora`` behind its name serves it with LoRA on."""
    name, _, lora = name.partition("+")
    # Where the processor has AMX, vLLM's attention over latents takes no weights in float32.
    with serving(name, enable_lora=bool(lora), dtype="bfloat16") as llm:
        try:
            model = VLLMModel(StepConnector.model, llm.llm_engine.vllm_config)
            find_ropes(model)
        except UnsupportedModelError as error:
            return {"refused": str(error)}
        return {"found_anywhere": find_model(next(iter(model.layers.values()))) is not None}


def main() -> None:
    scenario, result, *names = sys.argv[1:]
    Path(result).write_text(json.dumps({name: globals()[scenario](name) for name in names}))


if __name__ == "__main__":
    main()
