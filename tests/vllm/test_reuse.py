"""Invariant 1 on a real vLLM: greedy text with reuse equals text without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.harness import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# 20 prompts of 200–3,000 tokens; some end on a chunk boundary or one token beside it.
LENGTHS = [200, 255, 256, 257, 300, 350, 400, 450, 511, 512, 513, 600, 700, 768, 900, 1024, 1100, 1400, 2000, 3000]
CHUNK = 256


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def expected_reuse(length: int) -> int:
    """Whole chunks, but the last token is always left to vLLM."""
    return min(length // CHUNK * CHUNK, length - 1)


def differences(expected: list[dict[str, Any]], got: list[dict[str, Any]], tie: float) -> list[str]:
    """Prompts that are answered otherwise, but for those where the two best tokens are within ``tie`` of each other.

    Reuse computes the rest of a prompt in a smaller batch, as vLLM's own prefix cache and chunked prefill do, and a
    matrix product of another size may round otherwise: in bf16 that decides between tokens of equal merit.
    """
    wrong = []
    for index, (plain, reused) in enumerate(zip(expected, got, strict=True)):
        if plain["tokens"] == reused["tokens"]:
            continue
        place = next(i for i, (a, b) in enumerate(zip(plain["tokens"], reused["tokens"], strict=False)) if a != b)
        (best, one), (second, other) = plain["best_two"][place]
        # Of two that are quite alike the first here need not be the one that was chosen.
        if best - second > tie or reused["tokens"][place] not in (one, other):
            wrong.append(f"prompt {index} at token {place}: {plain['text']!r} became {reused['text']!r}")
    return wrong


def answer(tokens: list[int], best_two: list[tuple[float, int]]) -> dict[str, Any]:
    return {"tokens": tokens, "best_two": [best_two] * len(tokens), "text": str(tokens)}


@pytest.mark.parametrize(("chosen", "reused"), [(35, 36), (36, 35)])
def test_a_tie_may_be_decided_either_way(chosen: int, reused: int) -> None:
    alike = [(-1.4, 36), (-1.4, 35)]  # as sorted, whichever vLLM has chosen
    assert differences([answer([chosen], alike)], [answer([reused], alike)], 0.25) == []
    assert differences([answer([chosen], alike)], [answer([37], alike)], 0.25) != []
    apart = [(-1.4, chosen), (-1.7, reused)]
    assert differences([answer([chosen], apart)], [answer([reused], apart)], 0.25) != []


@pytest.mark.parametrize(
    ("dtype", "tie"),
    [
        ("float32", 0.0),
        ("bfloat16", 0.25),  # two logits between 16 and 32, each one unit in the last place (0.125) off
    ],
)
def test_text_with_reuse_equals_text_without(dtype: str, tie: float, tmp_path: Path) -> None:
    config = {"local_disk": str(tmp_path), "max_local_disk_size": 4.0, "max_local_cpu_size": 2.0}
    # Without instructions for it vLLM computes bfloat16 several times as slowly as float32: ten minutes for this test.
    slow = dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    asked = {"lengths": LENGTHS, "dtype": dtype, "shallow": slow}
    without = run("plain", **asked)
    served = run("reuse", **asked, config=config)
    restarted = run("from_disk", fresh=True, **asked, config=config)

    expected = without["answers"]
    assert tokens(served["first"]) == tokens(expected), "nothing is reused yet"
    assert differences(expected, served["again"], tie) == []
    assert tokens(restarted["answers"]) == tokens(served["again"]), "disk gives back what memory held"

    reuse = [expected_reuse(length) for length in LENGTHS]
    assert [answer["reuse"]["reused_tokens"] for answer in served["first"]] == [0] * len(LENGTHS)
    assert [answer["reuse"]["reused_tokens"] for answer in served["again"]] == reuse
    assert [answer["reuse"]["reused_tokens"] for answer in restarted["answers"]] == reuse
    assert {answer["reuse"]["tier"] for answer in served["again"]} == {None, "memory"}
    assert {answer["reuse"]["tier"] for answer in restarted["answers"]} == {None, "disk"}
    assert served["leaks"] == []
    assert restarted["leaks"] == []

    # The negative control: noise in the cache changes the text, so equal text above is no accident.
    hit = [i for i in range(len(served["corrupted"])) if reuse[i]]
    assert hit
    assert all(differences([expected[i]], [served["corrupted"][i]], tie) for i in hit)


def test_layerwise_loads_give_the_same_text(tmp_path: Path) -> None:
    lengths = [300, 700, 1100]
    without = run("plain", lengths=lengths, dtype="float32")
    served = run("reuse", lengths=lengths, dtype="float32", config={"use_layerwise": True})
    assert tokens(served["again"]) == tokens(without["answers"])
    assert [answer["reuse"]["reused_tokens"] for answer in served["again"]] == [256, 512, 1024]
    assert all(tokens(served["corrupted"])[i] != tokens(without["answers"])[i] for i in range(3))
    assert served["leaks"] == []


@pytest.mark.parametrize("hooks", [True, False])
def test_a_forward_that_is_replayed_whole_finds_its_layers_loaded(hooks: bool) -> None:
    """No hook is called then, and on a GPU vLLM would answer wrongly if it were told of that afterwards."""
    served = run("layerwise", hooks=hooks)
    assert served["calls"] == {"full": False, "piecewise": True, "no forward": False}
    assert served["by_layers"] == int(hooks)
    assert tokens(served["again"]) == tokens(served["expected"])
    assert served["again"][0]["reuse"]["reused_tokens"] == 512
    assert served["leaks"] == []


def test_unfull_chunks_and_generated_tokens_can_be_kept() -> None:
    config = {"save_unfull_chunk": True, "save_decode_cache": True}
    without = run("plain", lengths=[300, 700], dtype="float32")
    served = run("reuse", lengths=[300, 700], dtype="float32", config=config)
    assert tokens(served["again"]) == tokens(without["answers"])
    assert [answer["reuse"]["reused_tokens"] for answer in served["again"]] == [299, 699]


def test_a_conversation_reuses_its_own_answers() -> None:
    """The tail of the prompt was kept first, as a chunk that was not full, and is then part of one that is."""
    config = {"chunk_size": 8, "save_unfull_chunk": True, "save_decode_cache": True}
    answers = run("continued", config=config, length=301, max_tokens=16)
    assert answers["known"] > 304 + 8, "the answer must fill a chunk for this test to tell"
    # The last token was generated but never fed back, so it has no KV.
    assert answers["reused"]["reuse"]["reused_tokens"] == (answers["known"] - 1) // 8 * 8
    assert answers["reused"]["tokens"] == answers["plain"]["tokens"]
    assert answers["leaks"] == []
