"""A blend in vLLM answers as well as the library's own, which is what the published quality figures are of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.vllm.harness import run_module

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

POINTS = 0.02


@pytest.fixture(scope="module")
def agreement(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Share of answer tokens that are those of full prefill, at a recompute ratio of 15 %."""
    result = Path(tmp_path_factory.mktemp("quality"), "result.json")
    run_module("tests.vllm.blend.quality_scenario", [str(result)], timeout=900)
    found: dict[str, float] = json.loads(result.read_text())
    return found


@pytest.mark.timeout(1000)
def test_answers_agree_with_full_prefill_as_in_the_evaluation(agreement: dict[str, float]) -> None:
    assert abs(agreement["right"] - agreement["library"]) <= POINTS


@pytest.mark.parametrize("fault", ["keys not re-rotated", "bottom-right mask"])
def test_the_comparison_would_see_a_fault(agreement: dict[str, float], fault: str) -> None:
    assert agreement["library"] - agreement[fault] > POINTS
