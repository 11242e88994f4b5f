"""A blend in SGLang answers as well as the library's own, which is what the published quality figures are of."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

from lmcache.evaluation.measures import token_agreement
from lmcache.evaluation.prompt_parts import PromptParts
from lmcache.segmentation.anchors import WINDOW
from tests.quality import ANSWER_TOKENS, RATIO, before, library, segments, until
from tests.sglang.blend.faults import MISTAKES
from tests.sglang.blend.server import LEARN, PLAIN, blend_server
from tests.sglang.server import MODEL

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(1500)]

POINTS = 0.02
RIGHT = "right"


def whole_chunks(prompts: list[PromptParts]) -> int:
    """A size of chunks that leaves no passage an end too short to be kept."""
    lengths = [len(before(parts)) + len(passage) for parts in prompts for passage in parts.passage_ids]
    return next(size for size in range(WINDOW, 512) if all(not 0 < length % size < WINDOW for length in lengths))


@pytest.fixture(scope="module")
def agreement(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Share of answer tokens that are those of full prefill, at a recompute ratio of 15 %."""
    from transformers import AutoTokenizer

    prompts, expected = library(MODEL)
    stop = AutoTokenizer.from_pretrained(MODEL).eos_token_id
    config = {
        "chunk_size": whole_chunks(prompts),
        "blend_min_tokens": WINDOW,
        "blend_min_coverage": 0,
        "log_level": "DEBUG",
    }
    found: dict[str, list[float]] = {RIGHT: [], **{mistake: [] for mistake in MISTAKES}}
    with blend_server(Path(tmp_path_factory.mktemp("quality")), config) as server:
        for parts in prompts:
            for passage in parts.passage_ids:
                prompt = [*before(parts), *passage]
                named = {"lmcache.segments": [{"start": len(prompt) - len(passage), "end": len(prompt)}]}
                server.ask(prompt, {**LEARN, **named}, max_tokens=2)
            reference = until(server.ask(parts.input_ids, PLAIN, max_tokens=ANSWER_TOKENS).tokens, stop)
            blend = {"lmcache.segments": segments(parts), "lmcache.blend_ratio": RATIO, "lmcache.skip_save": True}
            for name in found:
                if name == RIGHT:
                    answer = server.ask(parts.input_ids, blend, max_tokens=ANSWER_TOKENS)
                else:
                    with server.probed.failing(name):
                        answer = server.ask(parts.input_ids, blend, max_tokens=ANSWER_TOKENS)
                assert answer.storage == len(parts.input_ids) - 1
                # Every passage is reused whole, as in the library.
                said = re.findall(r"CacheBlend of \S+ (\d+) tokens reused, 0 of them exact", server.probed.log())
                assert int(said[-1]) == sum(map(len, parts.passage_ids))
                found[name].append(token_agreement(reference, until(answer.tokens, stop)))
    return {"library": mean(expected), **{name: mean(each) for name, each in found.items()}}


def test_answers_agree_with_full_prefill_as_in_the_evaluation(agreement: dict[str, float]) -> None:
    assert abs(agreement[RIGHT] - agreement["library"]) <= POINTS, agreement


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_would_see_a_mistake(agreement: dict[str, float], mistake: str) -> None:
    assert agreement["library"] - agreement[mistake] > POINTS, agreement
