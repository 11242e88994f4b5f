"""What was promised and does not come is computed before vLLM's forward, so that vLLM need not know.

What vLLM does by itself then is right here, and wrong on a GPU (vLLM issue 49250): nothing may be left to it.
"""

from __future__ import annotations

import pytest

from tests.vllm.harness import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("blending", [True, False])
def test_what_does_not_come_is_computed(blending: bool) -> None:
    served = run("lost", module="tests.vllm.blend.lost_load_scenarios", blending=blending)
    assert len(served["answers"]) == (3 if blending else 1)
    for name, answer in served["answers"].items():
        text = answer["expected"]["tokens"]
        assert answer["hurt"]["tokens"] == text, name
        assert answer["hurt"]["reuse"]["reused_tokens"] == 0, name
        assert answer["hurt"]["reuse"].get("blend") is None, name
        assert answer["nothing done"]["tokens"] != text, f"{name}: what was not filled would not be seen"
        assert answer["healed"]["reuse"]["reused_tokens"] > 0, name
    assert served["left_to_vllm"] == []
    counted = served["counted"]
    assert counted['lmcache_failures_total{reason="load"}'] >= len(served["answers"])
    assert 'lmcache_failures_total{reason="compute_lost"}' not in counted
    assert served["leaks"] == []
