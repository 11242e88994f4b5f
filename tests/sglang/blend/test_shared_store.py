"""What one SGLang stored, another that has seen nothing reuses, as a prefix and as a passage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sglang.blend.server import LEARN, PLAIN, WHOLE, Library, blend_server
from tests.storage.remote.false_store import falsify

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TOKENS = 16


def test_two_servers_on_one_store(tmp_path: Path) -> None:
    library = Library(documents=5, tokens=150)
    config = {"remote_url": f"file://{tmp_path}/store", "remote_lookup_seconds": 5.0}
    asked, other, shuffled = library.prompt([0, 1]), library.prompt([2, 3]), library.prompt([4, 1, 0])
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with blend_server(tmp_path / "first", config) as first:
        library.teach(first)
        for prompt in (asked, other):
            first.ask(prompt, LEARN, max_tokens=1)
    with blend_server(tmp_path / "second", config) as second:
        expected = [second.ask(prompt, PLAIN, max_tokens=TOKENS).tokens for prompt in (asked, shuffled)]
        prefix = second.ask(asked, LEARN, max_tokens=TOKENS)
        assert prefix.storage > 0.8 * len(asked)
        assert prefix.tokens == expected[0]
        blended = second.ask(shuffled, WHOLE, max_tokens=TOKENS)
        assert blended.storage > 0.8 * len(shuffled)
        assert blended.tokens == expected[1], "every token was computed, so the text is that of a full prefill"
        assert falsify(tmp_path / "store") > 0
        false = second.ask(other, LEARN, max_tokens=TOKENS)
        assert false.storage > 0.8 * len(other)
        assert false.tokens != second.ask(other, PLAIN, max_tokens=TOKENS).tokens, (
            "what comes from the store is what is used"
        )
        assert "memory leak" not in second.probed.log()
