"""SGLang 0.5.23 as it is, with our connector in it, and without."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.sglang.false_kv import falsify
from tests.sglang.generation_c.probe import FAULTS
from tests.sglang.generation_c.probed_server import Aborted, ProbedServer, probed_server
from tests.sglang.generation_c.prompts import Asked, document, question, storm, ten_prompts
from tests.sglang.server import Generation

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TOKENS = 12
STORM = storm(100)
FAULT_PROMPTS = {fault: f"{document(60 + n, 3)} {question(n)}" for n, fault in enumerate(FAULTS)}
# SGLang's own cache is small: requests wait for room, and what they share is evicted.
SMALL_POOL = ["--max-total-tokens", "1024"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What SGLang without us answers, by prompt."""
    wanted = dict.fromkeys([*ten_prompts(), *FAULT_PROMPTS.values()], TOKENS)
    wanted |= {asked.prompt: 6 for asked in STORM}
    with (
        probed_server(tmp_path_factory.mktemp("plain"), lmcache=False) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        answers = pool.map(lambda item: server.generate(item[0], max_tokens=item[1]), wanted.items())
        return {prompt: answer.tokens for prompt, answer in zip(wanted, answers, strict=True)}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[ProbedServer]:
    with probed_server(tmp_path_factory.mktemp("server"), {"local_disk": disk}, arguments=SMALL_POOL) as running:
        yield running
        assert _unexpected_tracebacks(running.log()) == []


def test_text_is_equal_with_kv_from_memory(server: ProbedServer, plain: dict[str, list[int]]) -> None:
    for prompt in ten_prompts():
        cold = server.generate(prompt, max_tokens=TOKENS)
        server.flush()
        warm = server.generate(prompt, max_tokens=TOKENS)
        assert cold.storage == 0
        assert warm.own == 0
        assert warm.storage == (warm.prompt_tokens - 1) // 16 * 16
        assert cold.tokens == warm.tokens == plain[prompt]
    quiet(server)


def test_a_hit_behind_what_sglang_still_has(server: ProbedServer) -> None:
    prompt, beginning = f"{document(11)} {question(0)}", document(11, 2)
    cold = server.generate(prompt, salt="behind")
    server.flush()
    server.generate(beginning, salt="behind", max_tokens=1)
    warm = server.generate(prompt, salt="behind")
    assert warm.own > 0
    assert warm.storage > 0
    assert warm.own + warm.storage == (warm.prompt_tokens - 1) // 16 * 16
    assert warm.tokens == cold.tokens
    quiet(server)


def test_tenants_are_apart(server: ProbedServer) -> None:
    prompt = f"{document(12)} {question(1)}"

    def reused(salt: str | None, extra_key: str | None) -> int:
        server.flush()
        return server.generate(prompt, max_tokens=1, salt=salt, extra_key=extra_key).storage

    whose = [(None, None), ("a", None), (None, "a"), ("a", "a"), ("ab", "c"), ("a", "bc"), ("\0sglang:", "x")]
    for salt, key in whose:
        assert reused(salt, key) == 0, "another tenant's"
    for salt, key in whose:
        assert reused(salt, key) > 0, "its own"
    quiet(server)


def test_a_storm_of_requests(server: ProbedServer, plain: dict[str, list[int]]) -> None:
    def ask(numbered: tuple[int, Asked]) -> Generation | Aborted:
        number, asked = numbered
        time.sleep(asked.wait)
        if asked.abort_after is None:
            return server.generate(asked.prompt, max_tokens=asked.max_tokens, salt=asked.salt)
        return server.generate_and_abort(asked.prompt, f"storm-{number}", asked.abort_after, salt=asked.salt)

    answers: list[Generation | Aborted] = []
    with ThreadPoolExecutor(12) as pool:
        for wave in range(0, len(STORM), 25):
            answers += pool.map(ask, list(enumerate(STORM))[wave : wave + 25])
            server.flush()
    for asked, answer in zip(STORM, answers, strict=True):
        compared = min(len(answer.tokens), 6)
        assert answer.tokens[:compared] == plain[asked.prompt][:compared]
    served = [answer for answer in answers if isinstance(answer, Generation)]
    aborted = [answer for answer in answers if isinstance(answer, Aborted)]
    assert sum(answer.storage for answer in served) > 1000
    assert sum(answer.reason == "abort" for answer in aborted) > 10
    quiet(server)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_call_costs_a_hit_at_most(server: ProbedServer, plain: dict[str, list[int]], fault: str) -> None:
    prompt = FAULT_PROMPTS[fault]
    before = _failures(server)
    with server.failing(fault):
        storing = server.generate(prompt, max_tokens=TOKENS)
        server.flush()
    server.generate(prompt, max_tokens=1)
    server.flush()
    with server.failing(fault):
        loading = server.generate(prompt, max_tokens=TOKENS)
        server.flush()
    after = server.generate(prompt, max_tokens=TOKENS)
    assert storing.tokens == loading.tokens == after.tokens == plain[prompt]
    assert after.storage > 0
    assert _failures(server) > before
    quiet(server)


def test_clearing_the_storage(server: ProbedServer) -> None:
    prompt = f"{document(13)} {question(3)}"
    server.generate(prompt, max_tokens=1)
    server.flush()
    server.clear_storage()
    assert server.generate(prompt, max_tokens=1).storage == 0
    quiet(server)


def test_restarts_on_one_disk(plain: dict[str, list[int]], tmp_path: Path) -> None:
    """Written with pages of one token, read with pages of 16; then read again with every value's sign turned."""
    prompts, config = ten_prompts(), {"local_disk": tmp_path / "kv"}
    with probed_server(tmp_path, config) as first:
        for prompt in prompts:
            first.generate(prompt, max_tokens=1)
        _wait_for_writes(first)
    config["local_cpu"] = False
    with probed_server(tmp_path, config, page_size=16) as second:
        for prompt in prompts:
            answer = second.generate(prompt, max_tokens=TOKENS)
            assert answer.storage == (answer.prompt_tokens - 1) // 16 * 16
            assert answer.tokens == plain[prompt]
        assert second.state()["metrics"]['lmcache_reused_tokens_total{tier="disk"}'] > 500
        quiet(second)
    assert falsify(tmp_path / "kv") > 50
    with probed_server(tmp_path, config) as third:
        answers = [third.generate(prompt, max_tokens=TOKENS) for prompt in prompts]
        assert all(answer.storage for answer in answers)
        assert all(answer.tokens != plain[prompt] for prompt, answer in zip(prompts, answers, strict=True))


def quiet(server: ProbedServer) -> None:
    """Nothing is held for anybody, and SGLang finds no slot lost."""
    server.flush()
    state = server.state()
    assert state["open"] == 0
    assert state["leaks"] == []
    assert "memory leak" not in server.log()


def _failures(server: ProbedServer) -> float:
    return sum(value for name, value in server.state()["metrics"].items() if name.startswith("lmcache_failures_total"))


def _wait_for_writes(server: ProbedServer) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        metrics = server.state()["metrics"]
        entries = [metrics.get(f'lmcache_tier_entries{{tier="{tier}"}}', 0) for tier in ("memory", "disk")]
        if entries[0] == entries[1] > 0:
            return
        time.sleep(0.2)
    raise AssertionError(f"the disk has {entries[1]} of {entries[0]} chunks")


def _unexpected_tracebacks(log: str) -> list[str]:
    """Those that went through our code, but not because the tests asked for it."""
    tracebacks = [part.split("\n[20", 1)[0] for part in log.split("Traceback (most recent call last):")[1:]]
    return [text for text in tracebacks if "src/lmcache" in text and "InjectedError" not in text]
