"""Passages that are told, instead of found: between separators, or named by the request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.sglang.blend.server import LEARN, PLAIN, WHOLE, Library, blend_server

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def test_separators_and_named_passages(tmp_path: Path) -> None:
    library = Library(documents=3, tokens=150)
    encode, decode = library.tokenizer.encode, library.tokenizer.decode
    texts = [decode(document).strip() for document in library.documents]
    told = encode(" # # ".join(["You are a clerk.", texts[2], texts[0], "Which shelf?"]))
    start = decode(told).index(texts[2])

    def named(first: int, last: int, unit: str = "char") -> dict[str, Any]:
        return {**WHOLE, "lmcache.segments": [{"start": first, "end": last, "unit": unit}]}

    with blend_server(tmp_path, {"blend_segmentation": "separator", "blend_min_tokens": 48}) as server:
        server.ask(encode(" # # ".join(["You are a clerk.", *texts, "Which room?"])), LEARN, max_tokens=1)
        plain = server.ask(told, PLAIN)
        between = server.ask(told, WHOLE)
        assert between.tokens == plain.tokens
        assert between.storage > 0.8 * len(told), "both passages, found although the tokenizer merges separators"
        # The server's separators stand back for what a request names.
        one = server.ask(told, named(start, start + len(texts[2])))
        assert one.tokens == plain.tokens
        assert one.storage > 0, "one of the passages, named by its characters"
        for params in (named(5, 99_999), {**WHOLE, "lmcache.segments": "all of it"}):
            refused = server.ask(told, params)
            assert refused.tokens == plain.tokens
            assert refused.storage < 0.3 * len(told), "a request that names what is not there is served as ever"
        metrics = server.probed.state()["metrics"]
        assert metrics['lmcache_blend_fallbacks_total{reason="bad_request"}'] == 2
        assert "memory leak" not in server.probed.log()
