"""HiCache of a real SGLang, with our backend behind it: from memory, from the disk, and with false KV there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sglang.false_kv import falsify
from tests.sglang.generation_c.prompts import document, question, ten_prompts
from tests.sglang.hicache.server import PAGE, hicache_server
from tests.sglang.one_store.test_one_store import wait_for_writes
from tests.sglang.server import Server

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TOKENS = 12
CONTROLS = [f"{document(80 + number)} {question(number)}" for number in range(3)]
"""Whose KV is made false on the disk."""


def test_pages_come_from_our_backend(tmp_path: Path) -> None:
    disk, prompts = tmp_path / "kv", ten_prompts()
    with hicache_server(tmp_path, None) as server:
        plain = {prompt: server.generate(prompt, max_tokens=TOKENS).tokens for prompt in [*prompts, *CONTROLS]}
    with hicache_server(tmp_path, disk) as server:
        for prompt in prompts:
            server.flush()
            cold = server.generate(prompt, max_tokens=TOKENS)
            assert cold.storage == 0
            assert cold.tokens == plain[prompt]
        wait_for_writes(disk)
        reused = _served_from_storage(server, prompts, plain)
        right = set(disk.rglob("*.kv"))
        for prompt in CONTROLS:
            server.generate(prompt, max_tokens=1)
        wait_for_writes(disk)
        _check_log(server)
    false = falsify(disk, but=right)
    assert false >= 5 * len(CONTROLS)
    with hicache_server(tmp_path, disk) as server:
        after_restart = _served_from_storage(server, prompts, plain)
        for prompt in CONTROLS:
            server.flush()
            answer = server.generate(prompt, max_tokens=TOKENS)
            assert answer.storage == (answer.prompt_tokens - 1) // PAGE * PAGE
            assert answer.tokens != plain[prompt]
        _check_log(server)
    print(f"{reused} tokens from our tiers, {after_restart} after a restart; {false} false pages gave other text")


def _served_from_storage(server: Server, prompts: list[str], plain: dict[str, list[int]]) -> int:
    """How many tokens came from us; SGLang's slots and its host pool are emptied before each prompt."""
    reused = 0
    for prompt in prompts:
        server.flush()
        warm = server.generate(prompt, max_tokens=TOKENS)
        assert warm.own == 0
        assert warm.storage == (warm.prompt_tokens - 1) // PAGE * PAGE
        assert warm.tokens == plain[prompt]
        reused += warm.storage
    return reused


def _check_log(server: Server) -> None:
    server.flush()
    assert "memory leak" not in server.log()
    assert "src/lmcache" not in server.log(), "a traceback through our code"
