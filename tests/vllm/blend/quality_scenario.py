"""The same questions, blended by the library on transformers and by vLLM; see :mod:`tests.vllm.blend.test_quality`.

Runs in a process of its own: ``python -m tests.vllm.blend.quality_scenario RESULT.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch

from lmcache.blend.attention import QueryMask
from lmcache.blend.correctors import make_corrector
from lmcache.blend.policies import make_policy
from lmcache.blend.rope import FusedRope
from lmcache.config import LMCacheEngineConfig
from lmcache.evaluation.blended import BlendedModel
from lmcache.evaluation.measures import token_agreement
from lmcache.evaluation.prompt_parts import PromptParts
from lmcache.evaluation.tasks.generate import generate_tasks
from lmcache.evaluation.variants import Variant
from tests.vllm.harness import model_path
from tests.vllm.scenarios import generate, start_llm

TASKS, ANSWER_TOKENS, RATIO = 8, 24, 0.15
DEFAULTS = LMCacheEngineConfig.from_defaults()
POLICY, CORRECTOR = DEFAULTS.blend_policy, DEFAULTS.blend_corrector


def library() -> tuple[list[PromptParts], list[float]]:
    """What ``lmcache evaluate`` measures: the prompts, and how far each answer agrees with full prefill."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    subject = BlendedModel(
        model,
        tokenizer,
        {POLICY: make_policy(POLICY)},
        {CORRECTOR: make_corrector(CORRECTOR)},
        answer_tokens=ANSWER_TOKENS,
    )
    variant = Variant(POLICY, CORRECTOR, RATIO, RATIO)
    prompts, agreements = [], []
    for task in generate_tasks(TASKS, seed=40):
        parts = subject.parts(task)
        full = subject.full_prefill(parts)
        with subject.blending(parts, [_before(parts)] * len(parts.passage_ids)) as blend:
            (answer,) = blend([variant])
        prompts.append(parts)
        agreements.append(token_agreement(full.tokens, answer.tokens))
    return prompts, agreements


def in_vllm(prompts: list[PromptParts]) -> dict[str, list[float]]:
    """Agreement of vLLM's blended answers with vLLM's own, as it is and with each of two faults."""
    llm = start_llm(
        "built-in",
        {
            "enable_blending": True,
            "chunk_size": 128,
            "save_unfull_chunk": True,
            "blend_min_tokens": 32,
            "blend_min_coverage": 0,
        },
    )
    stop = llm.get_tokenizer().eos_token_id
    found: dict[str, list[float]] = {"right": [], "keys not re-rotated": [], "bottom-right mask": []}
    for parts in prompts:
        for passage in parts.passage_ids:
            prompt = [*_before(parts), *passage]
            segment = {"start": len(prompt) - len(passage), "end": len(prompt)}
            generate(llm, [prompt], 1, {"lmcache.blend": False, "lmcache.segments": [segment]})
        plain = {"lmcache.blend": False, "lmcache.skip_load": True, "lmcache.skip_save": True}
        reference = _until(generate(llm, [parts.input_ids], ANSWER_TOKENS, plain)[0]["tokens"], stop)
        blended = {
            "lmcache.segments": _segments(parts),
            "lmcache.blend_ratio": RATIO,
            "lmcache.skip_save": True,
        }
        for name, faults in (
            ("right", []),
            ("keys not re-rotated", [_unrotated]),
            ("bottom-right mask", [_bottom_right]),
        ):
            with _applied(faults):
                (answer,) = generate(llm, [parts.input_ids], ANSWER_TOKENS, blended)
            report = answer["reuse"]["blend"]
            assert report["fallback"] is None, report
            held = sum(segment["end"] - segment["start"] for segment in report["segments"])
            assert held == sum(map(len, parts.passage_ids)), (_segments(parts), report["segments"])
            found[name].append(token_agreement(reference, _until(answer["tokens"], stop)))
    return found


def _before(parts: PromptParts) -> list[int]:
    """What a passage is cached behind: no prompt begins so, or its first passage would be an exact prefix."""
    return [*parts.system_ids, *parts.question_ids[:8]]


def _segments(parts: PromptParts) -> list[dict[str, int]]:
    ends = list(accumulate((len(ids) for ids in parts.passage_ids), initial=len(parts.system_ids)))
    return [{"start": start, "end": end} for start, end in pairwise(ends)]


def _until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


@contextmanager
def _applied(faults: list[Callable[[], Any]]) -> Iterator[None]:
    if not faults:
        yield
        return
    with faults[0](), _applied(faults[1:]):
        yield


def _unrotated() -> Any:
    return patch.object(FusedRope, "fused_encode", lambda self, old, new, k, **lengths: k)


def _bottom_right() -> Any:
    """The mask of a kernel that takes the rows for the last ones of the prompt."""
    made = QueryMask.__init__

    def shifted(self: QueryMask, positions: torch.Tensor, *arguments: Any) -> None:
        last = int(positions[-1])
        made(self, torch.arange(last + 1 - len(positions), last + 1), *arguments)

    return patch.object(QueryMask, "__init__", shifted)


def main() -> None:
    prompts, expected = library()
    answer = {"library": mean(expected), **{name: mean(found) for name, found in in_vllm(prompts).items()}}
    Path(sys.argv[1]).write_text(json.dumps(answer))
    print(answer)


if __name__ == "__main__":
    main()
