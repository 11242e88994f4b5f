"""One folder for vLLM and SGLang: what either has written, the other finds."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.sglang.generation_c.probed_server import probed_server
from tests.sglang.server import MODEL, REPOSITORY
from tests.vllm.harness import VLLM_ENVIRONMENT

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def vllm(folder: Path, scratch: Path, which: str) -> dict[str, Any]:
    python = os.environ.get("VLLM_PYTHON")
    if python is None:
        pytest.skip("VLLM_PYTHON names no Python with vLLM")
    paths = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    done = subprocess.run(
        [python, "-m", "tests.sglang.one_store.vllm_side", str(folder), str(scratch / "result.json"), which],
        env={**os.environ, **VLLM_ENVIRONMENT, "PYTHONPATH": paths, "SMOLLM2_PATH": str(MODEL)},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-60:])
    answer: dict[str, Any] = json.loads((scratch / "result.json").read_text())
    return answer


def wait_for_writes(folder: Path) -> None:
    """Until a second goes by without another chunk."""
    count, stable = -1, 0
    while stable < 10:
        time.sleep(0.1)
        found = len(list(folder.rglob("*.kv")))
        count, stable = found, stable + 1 if found == count else 0


def test_one_store(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    first = vllm(folder, tmp_path, "first")
    prompts, count = first["prompts"], len(first["tokens"])
    assert [told["reused_tokens"] for told in first["reuse"]] == [0] * count
    with probed_server(tmp_path, {"local_disk": folder, "local_cpu": False}, sleeps_on_idle=False) as server:
        answers = []
        for prompt in prompts:
            server.flush()
            answers.append(server.generate(prompt, max_tokens=8))
        wait_for_writes(folder)
    for prompt, told, answer in zip(prompts, first["tokens"], answers, strict=False):
        assert answer.storage == whole_chunks(prompt), "vLLM wrote it"
        assert answer.tokens == told
    assert [answer.storage for answer in answers[count:]] == [0] * count
    second = vllm(folder, tmp_path, "second")
    for prompt, told, reuse, answer in zip(
        prompts[count:], second["tokens"], second["reuse"], answers[count:], strict=True
    ):
        # vLLM also takes a last chunk that ends with the prompt, all but its last token.
        assert reuse["reused_tokens"] == min(len(prompt) // 16 * 16, len(prompt) - 1), "SGLang wrote it"
        assert told == answer.tokens


def whole_chunks(prompt: list[int]) -> int:
    return (len(prompt) - 1) // 16 * 16
