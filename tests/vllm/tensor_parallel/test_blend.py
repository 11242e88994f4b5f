"""CacheBlend where every rank holds a part of the heads: ranks choose the same tokens, by what all heads say.

About 20 s and 2 GB a vLLM on two cores.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.vllm.harness import run as run_module

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

run = partial(run_module, module="tests.vllm.tensor_parallel.scenarios", timeout=600)

CONFIG = {"chunk_size": 64, "max_local_cpu_size": 0.25, "enable_blending": True, "blend_min_tokens": 64}


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def reports(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    return [
        {key: value for key, value in answer["reuse"]["blend"].items() if key != "milliseconds"} for answer in answers
    ]


@pytest.fixture(scope="module")
def one_rank(model: str) -> Any:
    return run("blended", model=model, tp=1, config=CONFIG)


@pytest.mark.parametrize(
    ("connector", "config"),
    [
        ("built-in", {}),
        ("dynamic", {"chunk_layout": "token_major"}),
        ("built-in", {"blend_policy": "kv_deviation", "blend_corrector": "none"}),
    ],
)
def test_two_ranks_blend_as_one_does(connector: str, config: dict[str, Any], model: str, one_rank: Any) -> None:
    alone = run("blended", model=model, tp=1, config={**CONFIG, **config}) if "blend_policy" in config else one_rank
    two = run("blended", model=model, tp=2, config={**CONFIG, **config}, connector=connector)

    assert tokens(two["all"]) == tokens(two["plain"]) == tokens(alone["plain"]), "ratio 1.0 is a full prefill"
    for kind in ("all", "some", "none"):
        assert all(answer["reuse"]["blend"]["segments"] for answer in two[kind])
        assert reports(two[kind]) == reports(alone[kind]), f"the same passages, and the same tokens of them: {kind}"
        assert tokens(two[kind]) == tokens(alone[kind])
    assert len(two["chosen"][0]) == 9
    assert two["chosen"][1] == two["chosen"][0]

    # One rank's share of the passages is noise, and the text tells.
    assert all(wrong != right for wrong, right in zip(tokens(two["corrupted"]), tokens(two["none"]), strict=True))
    # What one rank has lost, none uses.
    assert tokens(two["lost"]) == tokens(two["plain"])
    assert [answer["reuse"]["reused_tokens"] for answer in two["lost"]] == [0, 0, 0]
    for rank in [*two["ranks"], *two["after"]]:
        assert rank["leaks"] == []
        assert rank["failed_loads"] == 0
    assert two["free"]


def test_ranks_that_do_not_agree_choose_otherwise(model: str) -> None:
    """So the ranks of the test above are equal because they agree, and not because all heads look alike."""
    two = run("blended", model=model, tp=2, config=CONFIG, agreeing=False)
    assert two["chosen"][1] != two["chosen"][0]
