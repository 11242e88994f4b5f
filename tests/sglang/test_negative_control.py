"""What the other tests conclude from equal text holds only if false KV gives other text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sglang.false_kv import falsify
from tests.sglang.server import sglang_server

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
PROMPT = "The harbour master keeps a book in which every ship that enters the harbour is written down. " * 4


def test_false_kv_gives_other_text(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with sglang_server(tmp_path, {"local_disk": str(disk)}) as server:
        computed = server.generate(PROMPT)
        server.flush()
        reused = server.generate(PROMPT)
    assert computed.storage == 0
    assert reused.storage > computed.prompt_tokens // 2
    assert reused.tokens == computed.tokens
    assert falsify(disk) > 0
    with sglang_server(tmp_path, {"local_disk": str(disk)}) as server:
        false = server.generate(PROMPT)
        salted = server.generate(PROMPT, salt="another tenant")
    assert false.storage == reused.storage
    assert false.tokens != computed.tokens
    assert salted.storage == 0
    assert salted.tokens == computed.tokens
