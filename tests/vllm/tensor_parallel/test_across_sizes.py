"""What some ranks have kept, on disk or in a shared store, another number of them finds: cut and joined by heads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.harness import run as run_module

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

run = partial(run_module, module="tests.vllm.tensor_parallel.scenarios", timeout=600)

LENGTHS = [300, 700]
CHUNK = 64
WHOLE_CHUNKS = [length // CHUNK * CHUNK for length in LENGTHS]


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_entries_are_found_with_another_number_of_ranks(first: int, then: int, model: str, tmp_path: Path) -> None:
    check(first, then, model, {"local_disk": str(tmp_path), "max_local_disk_size": 1.0})


def test_entries_in_a_shared_store_are_found_with_another_number_of_ranks(model: str, tmp_path: Path) -> None:
    check(2, 1, model, {"remote_url": f"file://{tmp_path}", "remote_lookup_seconds": 5, "remote_timeout_seconds": 30})


def check(first: int, then: int, model: str, kept_in: dict[str, Any]) -> None:
    config = {"chunk_size": CHUNK, "chunk_layout": "token_major", "max_local_cpu_size": 0.25, **kept_in}
    kept = run("asked", model=model, tp=first, lengths=LENGTHS, config=config)
    found = run("asked", fresh=True, model=model, tp=then, lengths=LENGTHS, config=config)
    assert [answer["reuse"]["reused_tokens"] for answer in kept["answers"]] == [0, 0]
    assert [answer["reuse"]["tokens_by_tier"] for answer in found["answers"]] == [
        {"resharded": tokens} for tokens in WHOLE_CHUNKS
    ]
    assert [answer["tokens"] for answer in found["answers"]] == [answer["tokens"] for answer in kept["answers"]]
    assert all(rank["leaks"] == [] for rank in found["ranks"])
