"""The same questions, blended by the library on transformers and by vLLM; see :mod:`tests.vllm.blend.test_quality`.

Runs in a process of its own: ``python -m tests.vllm.blend.quality_scenario RESULT.json``.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean
from unittest.mock import patch

from lmcache.blend.attention import QueryMask
from lmcache.blend.rope import FusedRope
from lmcache.evaluation.measures import token_agreement
from lmcache.evaluation.prompt_parts import PromptParts
from tests.blend_mistakes import BOTTOM_RIGHT, UNROTATED, bottom_right, unrotated
from tests.quality import ANSWER_TOKENS, RATIO, before, library, segments, until
from tests.vllm.harness import model_path
from tests.vllm.scenarios import generate, start_llm


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
    found: dict[str, list[float]] = {"right": [], UNROTATED: [], BOTTOM_RIGHT: []}
    for parts in prompts:
        for passage in parts.passage_ids:
            prompt = [*before(parts), *passage]
            segment = {"start": len(prompt) - len(passage), "end": len(prompt)}
            generate(llm, [prompt], 1, {"lmcache.blend": False, "lmcache.segments": [segment]})
        plain = {"lmcache.blend": False, "lmcache.skip_load": True, "lmcache.skip_save": True}
        reference = until(generate(llm, [parts.input_ids], ANSWER_TOKENS, plain)[0]["tokens"], stop)
        blended = {
            "lmcache.segments": segments(parts),
            "lmcache.blend_ratio": RATIO,
            "lmcache.skip_save": True,
        }
        mistakes: dict[str, AbstractContextManager[object]] = {
            "right": nullcontext(),
            UNROTATED: patch.object(FusedRope, "fused_encode", unrotated),
            BOTTOM_RIGHT: patch.object(QueryMask, "__init__", bottom_right),
        }
        for name, mistake in mistakes.items():
            with mistake:
                (answer,) = generate(llm, [parts.input_ids], ANSWER_TOKENS, blended)
            report = answer["reuse"]["blend"]
            assert report["fallback"] is None, report
            held = sum(segment["end"] - segment["start"] for segment in report["segments"])
            assert held == sum(map(len, parts.passage_ids)), (segments(parts), report["segments"])
            found[name].append(token_agreement(reference, until(answer["tokens"], stop)))
    return found


def main() -> None:
    prompts, expected = library(model_path())
    answer = {"library": mean(expected), **{name: mean(found) for name, found in in_vllm(prompts).items()}}
    Path(sys.argv[1]).write_text(json.dumps(answer))
    print(answer)


if __name__ == "__main__":
    main()
