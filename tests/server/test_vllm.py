"""Real vLLM engines, one after the other, on one server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache.server.serve import open_server
from lmcache.server.server import CacheServer
from tests.engine.helpers import make_config
from tests.eventually import eventually
from tests.vllm.harness import run
from tests.vllm.tensor_parallel.small_model import prompt, save

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCENARIOS = "tests.server.vllm_scenarios"
LENGTHS = [300, 700, 1100]
REUSED = [256, 512, 1024]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheServer]:
    """Where the engines of this user look for it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    # On a busy machine a second may pass, and what comes later counts as a miss: right, but not what is tested here.
    monkeypatch.setenv("LMCACHE_SERVER_TIMEOUT_SECONDS", "30")
    from lmcache.server.address import default_socket

    server = open_server(make_config(max_local_cpu_size=2.0), default_socket())
    yield server
    server.close()


def ask(connector: str | None, config: dict[str, Any] | None = None, **options: Any) -> list[dict[str, Any]]:
    answered = run(
        "ask",
        module=SCENARIOS,
        lengths=LENGTHS,
        connector=connector,
        config=config or {},
        options={"dtype": "float32", **options},
    )
    return answered["answers"]


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def reused(answers: list[dict[str, Any]]) -> list[int]:
    return [answer["reuse"]["reused_tokens"] for answer in answers]


def corrupt(server: CacheServer) -> None:
    for key in server.memory.keys():  # noqa: SIM118 - not a mapping
        with server.memory.get(key) as obj:
            noise = torch.randn(obj.tensor.shape, generator=torch.Generator().manual_seed(0))
            obj.tensor.copy_(noise.to(obj.tensor.dtype))


def test_an_engine_reuses_what_an_earlier_one_has_left(server: CacheServer) -> None:
    plain = ask(None)
    first = ask("built-in", {"server_socket": str(server.path)})
    assert tokens(first) == tokens(plain)
    assert reused(first) == [0, 0, 0]
    assert eventually(lambda: server.clients == 0)
    assert all(obj.ref_count == 1 for obj in server.memory.pool.live_objects())

    second = ask("mp")
    assert tokens(second) == tokens(plain)
    assert reused(second) == REUSED

    offloading = ask(None, kv_offloading_size=1.0, kv_offloading_backend="lmcache")
    assert tokens(offloading) == tokens(plain)
    assert reused(offloading) == REUSED

    corrupt(server)
    wrong = ask("mp")
    assert reused(wrong) == REUSED
    assert all(got != right for got, right in zip(tokens(wrong), tokens(plain), strict=True))


def test_an_engine_without_its_server_serves(tmp_path: Path) -> None:
    answers = ask("mp", {"server_socket": str(tmp_path / "nobody.sock")})
    assert all(answer["tokens"] for answer in answers)
    assert reused(answers) == [0, 0, 0]


def test_two_ranks_keep_their_shares_in_one_server(server: CacheServer, tmp_path: Path) -> None:
    """An engine on two ranks, and a second one: each rank finds its own share, and the text is the same."""
    model = tmp_path / "small-llama"
    save(model)
    prompts = [prompt(length, seed) for seed, length in enumerate((200, 300))]

    def ask_two(config: dict[str, Any] | None) -> list[dict[str, Any]]:
        answered = run("ask_ranks", module=SCENARIOS, model=str(model), prompts=prompts, config=config)
        return answered["answers"]

    plain = ask_two(None)
    config = {"server_socket": str(server.path), "chunk_size": 32}
    first, second = ask_two(config), ask_two(config)
    assert tokens(first) == tokens(plain)
    assert tokens(second) == tokens(plain)
    assert reused(first) == [0, 0]
    assert reused(second) == [192, 288]
    corrupt(server)
    assert tokens(ask_two(config)) != tokens(plain)


def assert_blended_from(server: CacheServer, answer: dict[str, Any], at_least: int) -> None:
    blend = answer["reuse"]["blend"]
    assert blend["fallback"] is None
    assert len(blend["segments"]) >= 2
    tiers = {tier for one in blend["segments"] for tier in one["tokens_by_tier"]}
    assert tiers == {"memory"}, "the only tier that there is, and the server's"
    assert sum(sum(one["tokens_by_tier"].values()) for one in blend["segments"]) >= at_least


def test_passages_that_one_engine_has_read_are_blended_by_another(server: CacheServer) -> None:
    read = run("read_passages", module=SCENARIOS, connector="mp")
    assert eventually(lambda: server.clients == 0)
    hits = server.memory.stats().hits

    found = run("ask_in_another_order", module=SCENARIOS, connector="mp")
    for name in ("all rows", "no rows", "not turned"):
        assert_blended_from(server, found[name], sum(read["lengths"]) // 2)
    assert server.memory.stats().hits > hits
    assert found["full"]["reuse"]["blend"] is None
    assert len(found["full"]["text"].split()) > 1, "an answer that another one could differ from"
    assert found["all rows"]["tokens"] == found["full"]["tokens"]
    assert found["not turned"]["text"] != found["no rows"]["text"]
    assert eventually(lambda: server.clients == 0)
    assert all(obj.ref_count == 1 for obj in server.memory.pool.live_objects()), "every lease is back"

    corrupt(server)
    spoilt = run("ask_in_another_order", module=SCENARIOS, connector="mp")
    assert_blended_from(server, spoilt["no rows"], sum(read["lengths"]) // 2)
    assert spoilt["full"]["text"] == spoilt["all rows"]["text"] == found["full"]["text"], "where all is computed"
    assert spoilt["no rows"]["text"] != found["no rows"]["text"], "what is blended are the server's bytes"
