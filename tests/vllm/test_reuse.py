"""Invariant 1 on a real vLLM: greedy text with reuse equals text without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_with_reuse_equals_text_without(dtype: str, tmp_path: Path) -> None:
    config = {"local_disk": str(tmp_path), "max_local_disk_size": 4.0, "max_local_cpu_size": 2.0}
    without = run("plain", lengths=LENGTHS, dtype=dtype)
    served = run("reuse", lengths=LENGTHS, dtype=dtype, config=config)
    restarted = run("from_disk", lengths=LENGTHS, dtype=dtype, config=config)

    expected = tokens(without["answers"])
    assert tokens(served["first"]) == expected
    assert tokens(served["again"]) == expected
    assert tokens(restarted["answers"]) == expected

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
    assert all(served["corrupted"][i]["tokens"] != expected[i] for i in hit)


def test_layerwise_loads_give_the_same_text(tmp_path: Path) -> None:
    lengths = [300, 700, 1100]
    without = run("plain", lengths=lengths, dtype="float32")
    served = run("reuse", lengths=lengths, dtype="float32", config={"use_layerwise": True})
    assert tokens(served["again"]) == tokens(without["answers"])
    assert [answer["reuse"]["reused_tokens"] for answer in served["again"]] == [256, 512, 1024]
    assert all(tokens(served["corrupted"])[i] != tokens(without["answers"])[i] for i in range(3))
    assert served["leaks"] == []


def test_unfull_chunks_and_generated_tokens_can_be_kept() -> None:
    config = {"save_unfull_chunk": True, "save_decode_cache": True}
    without = run("plain", lengths=[300, 700], dtype="float32")
    served = run("reuse", lengths=[300, 700], dtype="float32", config=config)
    assert tokens(served["again"]) == tokens(without["answers"])
    assert [answer["reuse"]["reused_tokens"] for answer in served["again"]] == [299, 699]
