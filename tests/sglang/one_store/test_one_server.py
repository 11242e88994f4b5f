"""SGLang on a cache server: what one engine has left another reuses, and neither needs the server to serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmcache.config import LMCacheEngineConfig
from lmcache.server.serve import open_server
from lmcache.server.server import CacheServer
from tests.eventually import eventually
from tests.sglang.generation_c.probed_server import ProbedServer, probed_server
from tests.sglang.generation_c.prompts import ten_prompts
from tests.sglang.server import Generation

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

PROMPTS = ten_prompts()[:4]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CacheServer]:
    server = open_server(LMCacheEngineConfig.from_defaults(max_local_cpu_size=1.0), tmp_path / "kv.sock")
    yield server
    server.close()


def ask(engine: ProbedServer) -> list[Generation]:
    """Each prompt, with nothing of it in SGLang's own cache."""
    answers = []
    for prompt in PROMPTS:
        engine.flush()
        answers.append(engine.generate(prompt, max_tokens=12))
    return answers


def tokens(answers: list[Generation]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def corrupt(server: CacheServer) -> None:
    for key in server.memory.keys():  # noqa: SIM118 - not a mapping
        with server.memory.get(key) as obj:
            obj.tensor.copy_(torch.randn(obj.tensor.shape).to(obj.tensor.dtype))


def test_one_server_for_engines_that_come_and_go(server: CacheServer, tmp_path: Path) -> None:
    attached = {"server_socket": server.path}
    with probed_server(tmp_path, attached) as first:
        cold = ask(first)
    assert [answer.storage for answer in cold[:1]] == [0]
    assert eventually(lambda: server.clients == 0)
    assert all(obj.ref_count == 1 for obj in server.memory.pool.live_objects())

    with probed_server(tmp_path, attached) as second:
        warm = ask(second)
        assert [answer.storage for answer in warm] == [(answer.prompt_tokens - 1) // 16 * 16 for answer in warm]
        assert tokens(warm) == tokens(cold)

        corrupt(server)
        assert all(false != right for false, right in zip(tokens(ask(second)), tokens(cold), strict=True))

        server.close()
        alone = ask(second)
        assert [answer.storage for answer in alone] == [0] * len(PROMPTS)
        assert tokens(alone) == tokens(cold)
        assert second.is_healthy()
        assert second.state()["leaks"] == []
