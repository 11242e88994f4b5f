"""What a server, a document or a user may do that must end in words."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lmcache.cli import explain_command
from lmcache.cli.main import app
from lmcache.client.explain import Fate, runs
from lmcache.client.reply import Blend, ReplyError, Reuse
from lmcache.client.server import Server, ServerError
from lmcache.client.warm import find_documents, warm
from tests.client.fake_server import serving


@contextmanager
def answering(raw: bytes) -> Iterator[str]:
    """The address of what sends ``raw`` to whoever asks, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(1 << 16)
                client.sendall(raw)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{}",
        b"HTTP/1.1 500 Broken\r\nContent-Length: 99\r\n\r\n{}",
        b"SSH-2.0-somebody\r\n",
    ],
    ids=["cut off", "cut off error", "no HTTP"],
)
def test_whatever_a_server_sends_is_an_error_in_words(raw: bytes) -> None:
    with answering(raw) as url, pytest.raises(ServerError, match=r"127\.0\.0\.1:\d+/x: ."):
        Server(url, "key", 5).post("/x", {})


def test_a_redirect_is_not_followed_so_the_key_stays_with_its_server() -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"
    with answering(moved) as url, pytest.raises(ServerError, match="302: Found"):
        Server(url, "key", 5).post("/x", {})


@pytest.fixture
def documents(tmp_path: Path) -> list[Path]:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    (tmp_path / "folder.md").mkdir()
    return find_documents([tmp_path])


def test_stopping_a_run_does_not_send_the_rest(documents: list[Path]) -> None:
    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    gate = threading.Semaphore(2)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        gate.acquire(timeout=1)
        return 200, {}

    with serving(answer) as (url, bodies), pytest.raises(KeyboardInterrupt):
        warm(Server(url), "m", "s", documents, parallel=1, on_progress=stop)
    assert len(documents) == 12
    assert len(bodies) <= 4


def test_a_state_that_cannot_be_written_is_said_before_anything_is_sent(documents: list[Path], tmp_path: Path) -> None:
    with serving(lambda path, body: (200, {})) as (url, bodies), pytest.raises(FileNotFoundError):
        warm(Server(url), "m", "s", documents, state=tmp_path / "none" / "state")
    assert bodies == []


def test_zero_bytes_are_no_text(tmp_path: Path) -> None:
    (file := tmp_path / "program.txt").write_bytes(b"\0\1ELF")
    assert "zero bytes" in warm(Server("http://127.0.0.1:9"), "m", "s", [file]).failed[file]


@pytest.mark.parametrize("span", [(6, 15), (-5, 3), (7, 6)])
def test_ranges_outside_the_prompt_are_refused(span: tuple[int, int]) -> None:
    segment = {"start": span[0], "end": span[1], "old_start": 0}
    raw = {"prompt_tokens": 10, "reused_tokens": 6, "blend": {"segments": [segment]}}
    with pytest.raises(ReplyError, match="is not in a prompt of 10 tokens"):
        Reuse.of({"kv_transfer_params": {"lmcache": raw}})


def test_a_blend_that_was_given_up_reused_only_its_prefix() -> None:
    reuse = Reuse(10, 8, blend=Blend(prefix_tokens=2, policy="sink", fallback="a passage could not be loaded"))
    assert [(run.end, run.fate) for run in runs(reuse)] == [(2, Fate.REUSED), (10, Fate.COMPUTED)]


REPLY = {
    "prompt_token_ids": [1, 2, 3, 4],
    "kv_transfer_params": {"lmcache": {"prompt_tokens": 4, "reused_tokens": 2}},
}
BODY: dict[str, Any] = {"model": "m", "messages": [], "stream": True, "stream_options": {"include_usage": True}}


def explained(tmp_path: Path, text: str) -> tuple[str, list[dict[str, Any]]]:
    (request := tmp_path / "request.json").write_text(json.dumps(BODY))
    with serving(lambda path, _: (200, {"prompt": text} if path == "/detokenize" else REPLY)) as (url, bodies):
        result = CliRunner().invoke(app, ["explain", str(request), "--server", url])
    assert result.exit_code == 0, result.output
    return result.output, bodies


def test_the_request_is_sent_so_that_its_reply_has_the_tokens(tmp_path: Path) -> None:
    _, bodies = explained(tmp_path, "x")
    assert bodies[0] == {"model": "m", "messages": [], "stream": False, "return_token_ids": True}
    assert len(bodies) == 3  # and two runs


def test_a_document_cannot_steer_the_terminal_and_is_not_folded(tmp_path: Path) -> None:
    output, _ = explained(tmp_path, "\x1b[2J" + "long " * 60)
    assert "\x1b" not in output
    assert "long " * 60 in output


def test_no_color_marks_what_was_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"NO_COLOR": "1", "TERM": "xterm-256color"}
    monkeypatch.setattr(explain_command, "Console", lambda: Console(force_terminal=True, _environ=environ))
    assert "[computed: x]" in explained(tmp_path, "x")[0]
