from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmcache.cli.main import app
from lmcache.client.explain import Fate, as_html, runs, summary, with_text
from lmcache.client.reply import Blend, ReplyError, Reuse, Segment
from lmcache.client.server import Server
from tests.client.fake_server import serving

REPLY = {
    "choices": [{"prompt_token_ids": list(range(20))}],
    "kv_transfer_params": {
        "lmcache": {
            "prompt_tokens": 20,
            "reused_tokens": 12,
            "tier": "memory",
            "tokens_by_tier": {"memory": 12},
            "blend": {
                "prefix_tokens": 4,
                "segments": [{"start": 6, "end": 14, "old_start": 40, "tokens_by_tier": {"disk": 8}}],
                "recomputed": [[7, 9]],
                "recomputed_tokens": 2,
                "policy": "sink",
                "corrector": "none",
                "ratio": 0.2,
                "charged_budget": 0.25,
                "milliseconds": {"load": 1.25},
                "fallback": None,
            },
        }
    },
}


def test_every_token_has_the_fate_that_the_reply_tells() -> None:
    assert [(run.start, run.end, run.fate.value) for run in runs(Reuse.of(REPLY))] == [
        (0, 4, "reused"),
        (4, 6, "computed"),
        (6, 7, "reused"),
        (7, 9, "recomputed"),
        (9, 14, "reused"),
        (14, 20, "computed"),
    ]
    text = summary(Reuse.of(REPLY))
    assert "20 tokens: 10 reused, 2 recomputed, 8 computed" in text
    assert "charged budget 25.0%" in text


def test_without_a_blend_the_prefix_is_what_was_reused() -> None:
    reuse = Reuse(prompt_tokens=10, reused_tokens=6, blend=Blend(fallback="nothing known"))
    assert [(run.start, run.end, run.fate) for run in runs(reuse)] == [(0, 6, Fate.REUSED), (6, 10, Fate.COMPUTED)]
    assert "not blended: nothing known" in summary(reuse)
    assert runs(Reuse(prompt_tokens=3, reused_tokens=3))[-1] == (2, 3, Fate.COMPUTED, "")


@given(st.integers(1, 60), st.data())
def test_runs_cover_the_prompt_once_in_order(length: int, data: st.DataObject) -> None:
    edges = sorted(data.draw(st.lists(st.integers(0, length), min_size=4, max_size=4)))
    segments = [Segment(edges[0], edges[1], 5), Segment(edges[2], edges[3], 9)]
    reuse = Reuse(length, 0, blend=Blend(prefix_tokens=0, segments=segments, recomputed=[(edges[0], edges[1])]))
    found = runs(reuse)
    assert [run.start for run in found] == [0, *(run.end for run in found[:-1])]
    assert found[-1].end == length


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({}, "no kv_transfer_params.lmcache"),
        ({"kv_transfer_params": None}, "Streamed replies have none"),
        ({"kv_transfer_params": {"lmcache": {"prompt_tokens": "x"}}}, "not of this version"),
    ],
)
def test_a_reply_that_tells_nothing_is_refused_in_words(reply: dict[str, Any], message: str) -> None:
    with pytest.raises(ReplyError, match=message):
        Reuse.of(reply)


def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if path == "/detokenize":
        return 200, {"prompt": "".join(f"<{token}>" for token in body["tokens"])}
    return 200, REPLY


def test_a_request_is_sent_and_its_prompt_printed_and_written_as_a_page(tmp_path: Path) -> None:
    request, page = tmp_path / "request.json", tmp_path / "page.html"
    request.write_text(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}))
    with serving(answer) as (url, bodies):
        result = CliRunner().invoke(app, ["explain", str(request), "--server", url, "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert bodies[0]["stream"] is False
    assert "<0><1><2><3>[computed: <4><5>]<6>[recomputed: <7><8>]<9>" in result.output.replace("\n", "")
    assert "&lt;7&gt;" in page.read_text()
    assert "passage from position 40, disk" in page.read_text()


def test_the_text_of_a_prompt_cannot_break_the_page() -> None:
    with serving(lambda path, body: (200, {"prompt": '</pre><script>"'})) as (url, _):
        parts = with_text(Reuse(2, 0), [1, 2], "m", Server(url))
    assert "<script>" not in as_html(Reuse(2, 0), parts)


def test_a_reply_to_another_request_is_refused(tmp_path: Path) -> None:
    request, reply = tmp_path / "request.json", tmp_path / "reply.json"
    request.write_text(json.dumps({"prompt": [1, 2, 3]}))
    reply.write_text(json.dumps({**REPLY, "choices": []}))
    with serving(answer) as (url, _):
        result = CliRunner().invoke(app, ["explain", str(request), "--server", url, "--reply", str(reply)])
    assert result.exit_code == 2
    assert "a prompt of 20 tokens, the request has 3" in result.output
