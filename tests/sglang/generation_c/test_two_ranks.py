"""Two real ranks, each with half of the heads and a cache of its own, that may find different parts of a prompt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.sglang.generation_c.probed_server import ProbedServer, probed_server
from tests.sglang.generation_c.prompts import document, question
from tests.sglang.generation_c.tiny_model import tiny_model

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

PROMPTS = [f"{document(number, 4)} {question(number)}" for number in range(4)]


def ask(server: ProbedServer) -> list[tuple[list[int], int]]:
    """Text and reused tokens of each prompt, with nothing left in SGLang's own cache."""
    answers = []
    for prompt in PROMPTS:
        server.flush()
        answer = server.generate(prompt, max_tokens=6)
        answers.append((answer.tokens, answer.storage))
    return answers


def check_quiet(server: ProbedServer) -> None:
    server.flush()
    for rank in (0, 1):
        state = server.state(rank)
        assert state["open"] == 0
        assert state["leaks"] == []
    assert "memory leak" not in server.log()


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # SGLang wants a NUMA node for each rank, or to be told their cores.
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"0|{min(1, (os.cpu_count() or 1) - 1)}")
    model = tiny_model(tmp_path / "model")
    config, two = {"local_disk": tmp_path / "kv"}, ["--tp-size", "2"]
    with probed_server(tmp_path, config, model=model, arguments=two) as server:
        cold, warm = ask(server), ask(server)
        assert [text for text, _ in warm] == [text for text, _ in cold]
        assert all(reused == 0 for _, reused in cold)
        assert min(reused for _, reused in warm) >= 32
        # The second rank alone fails: both must let the request go on without the cache.
        for fault in ("LMCacheEngine.prefetch", "LMCacheEngine.retrieve", "LMCacheEngine.store"):
            with server.failing(f"{fault}@1"):
                assert [text for text, _ in ask(server)] == [text for text, _ in cold]
        assert server.state(1)["metrics"]['lmcache_failures_total{reason="load_kv"}'] > 0
        check_quiet(server)
    # One rank loses half of what it has: both must agree on what is left.
    folders = sorted(folder for folder in (tmp_path / "kv").iterdir() if folder.is_dir())
    assert len(folders) == 2
    files = sorted(folders[1].rglob("*.kv"))
    assert len(files) > 8
    for file in files[::2]:
        file.write_bytes(b"lost")
    config["local_cpu"] = False
    with probed_server(tmp_path, config, model=model, arguments=two, sleeps_on_idle=False) as server:
        again = ask(server)
        assert [text for text, _ in again] == [text for text, _ in cold]
        assert sum(reused for _, reused in again) < sum(reused for _, reused in warm)
        check_quiet(server)
