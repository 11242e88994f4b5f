"""SGLang 0.5.12 (generation A) and 0.5.17 (generation B) as they are, with our connector in them, and without."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.sglang.engine_ab.old_server import OldServer, old_server
from tests.sglang.engine_ab.probe import HELD_SECONDS
from tests.sglang.false_kv import falsify
from tests.sglang.generation_c.probed_server import Aborted
from tests.sglang.generation_c.prompts import Asked, document, question, storm, ten_prompts
from tests.sglang.one_store.test_one_store import wait_for_writes
from tests.sglang.server import Generation

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TOKENS = 12
STORM = storm(100)
CONTROLS = [f"{document(80 + number)} {question(number)}" for number in range(3)]
"""Whose KV is made false on the disk."""


class Running:
    """The server that most tests share; the last one ends it, to start another on its disk."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.version, self.disk = folder, version, folder / "kv"
        self._stack = ExitStack()
        # SGLang's own cache is small: requests wait for room, and what they share is evicted.
        self.server = self._stack.enter_context(
            old_server(folder, version, {"local_disk": self.disk}, pool_tokens=1024)
        )

    def end(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module", params=["0.5.12", "0.5.17"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(version: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What SGLang of this version answers without us, by prompt."""
    wanted = dict.fromkeys([*ten_prompts(), *CONTROLS], TOKENS)
    wanted |= {asked.prompt: 6 for asked in STORM}
    with (
        old_server(tmp_path_factory.mktemp("plain"), version, lmcache=False) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        answers = pool.map(lambda item: server.generate(item[0], max_tokens=item[1]), wanted.items())
        return {prompt: answer.tokens for prompt, answer in zip(wanted, answers, strict=True)}


@pytest.fixture(scope="module")
def running(version: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    started = Running(tmp_path_factory.mktemp(f"server-{version}"), version)
    yield started
    started.end()


def test_text_is_equal_with_kv_from_memory(running: Running, plain: dict[str, list[int]]) -> None:
    server = running.server
    for prompt in ten_prompts():
        server.flush()
        cold, _, _ = server.cached(prompt, TOKENS)
        server.flush()
        warm, reused, length = server.cached(prompt, TOKENS)
        assert reused == (length - 1) // 16 * 16
        assert cold == warm == plain[prompt]
    check_quiet(server)


def test_a_storm_of_requests(running: Running, plain: dict[str, list[int]]) -> None:
    server, before = running.server, reused_tokens(running.server)

    def ask(numbered: tuple[int, Asked]) -> Generation | Aborted:
        number, asked = numbered
        time.sleep(asked.wait)
        if asked.abort_after is None:
            return server.generate(asked.prompt, max_tokens=asked.max_tokens)
        return server.generate_and_abort(asked.prompt, f"storm-{number}", asked.abort_after)

    answers: list[Generation | Aborted] = []
    with ThreadPoolExecutor(12) as pool:
        for wave in range(0, len(STORM), 25):
            answers += pool.map(ask, list(enumerate(STORM))[wave : wave + 25])
            check_quiet(server)
    for asked, answer in zip(STORM, answers, strict=True):
        compared = min(len(answer.tokens), 6)
        assert answer.tokens[:compared] == plain[asked.prompt][:compared]
    aborted = sum(isinstance(answer, Aborted) and answer.reason == "abort" for answer in answers)
    loaded = reused_tokens(server) - before
    print(f"{len(answers)} requests, {aborted} of them aborted; {loaded:.0f} tokens loaded")
    assert aborted > 10
    assert loaded > 500


def test_a_restart_on_one_disk(running: Running, plain: dict[str, list[int]]) -> None:
    """The text of ten prompts comes from the disk; that of others does not, whose KV was made false there meanwhile."""
    ask_all(running.server, ten_prompts())
    wait_for_writes(running.disk)
    right = set(running.disk.rglob("*.kv"))
    ask_all(running.server, CONTROLS)
    wait_for_writes(running.disk)
    running.end()
    assert falsify(running.disk, but=right) > 10
    with old_server(running.folder, running.version, {"local_disk": running.disk, "local_cpu": False}) as second:
        for prompt in ten_prompts():
            second.flush()
            answer, reused, length = second.cached(prompt, TOKENS)
            assert reused == (length - 1) // 16 * 16
            assert answer == plain[prompt]
        from_disk = state(second)["metrics"]['lmcache_reused_tokens_total{tier="disk"}']
        print(f"{from_disk:.0f} tokens from the disk after a restart")
        assert from_disk > 500
        for prompt in CONTROLS:
            second.flush()
            answer, reused, length = second.cached(prompt, TOKENS)
            assert reused == (length - 1) // 16 * 16
            assert answer != plain[prompt]
        check_quiet(second)


def ask_all(server: OldServer, prompts: list[str]) -> None:
    for prompt in prompts:
        server.generate(prompt, max_tokens=1)


def check_quiet(server: OldServer) -> None:
    """Nothing is held for anybody, and no slot is lost; SGLang's own cache is empty then."""
    time.sleep(HELD_SECONDS)
    server.generate("Yes", max_tokens=1)  # what was held for requests that were aborted in the queue goes
    answer = state(server)
    assert {name: answer[name] for name in ("leases", "leaks", "locked", "lost_slots")} == {
        "leases": 0,
        "leaks": [],
        "locked": 0,
        "lost_slots": 0,
    }
    assert "memory leak" not in server.log()
    assert "the request goes on without the cache" not in server.log()
    server.flush()


def state(server: OldServer) -> dict[str, Any]:
    """Of a server that has come to rest: an aborted request is answered before SGLang lets go of it."""
    deadline = time.monotonic() + 10
    while (found := server.state())["locked"] and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def reused_tokens(server: OldServer) -> float:
    metrics = server.state()["metrics"]
    return float(sum(value for name, value in metrics.items() if name.startswith("lmcache_reused_tokens_total")))
