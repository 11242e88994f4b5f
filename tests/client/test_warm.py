from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmcache.cli.main import app
from lmcache.client.server import Server
from lmcache.client.warm import find_documents, warm
from tests.client.fake_server import serving


def fine(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"choices": []}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    (docs / "deep").mkdir(parents=True)
    (docs / "one.txt").write_text("first")
    (docs / "deep" / "two.md").write_text("second")
    (docs / "three.bin").write_bytes(b"\xff\xfe")
    return docs


def test_a_directory_is_searched_for_texts_and_a_file_is_taken_as_it_is(folder: Path) -> None:
    assert find_documents([folder]) == [folder / "deep" / "two.md", folder / "one.txt"]
    assert find_documents([folder / "three.bin", folder / "three.bin"]) == [folder / "three.bin"]


def test_each_document_is_sent_once_behind_the_system_prompt_and_not_blended(folder: Path) -> None:
    with serving(fine) as (url, bodies):
        report = warm(Server(url + "/v1"), "m", "be brief", find_documents([folder]), template="Doc: {document}")
    assert len(report.done) == 2
    assert sorted(body["messages"][1]["content"] for body in bodies) == ["Doc: first", "Doc: second"]
    for body in bodies:
        assert body["messages"][0] == {"role": "system", "content": "be brief"}
        assert body["max_tokens"] == 1
        assert body["kv_transfer_params"] == {"lmcache.blend": False}


def test_a_run_goes_on_where_the_last_one_stopped(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    documents = find_documents([folder])
    with serving(fine) as (url, bodies):
        warm(Server(url), "m", "s", documents[:1], state=state)
        with state.open("a") as file:
            file.write('{"done": "half a line of a run that was kil')
        report = warm(Server(url + "/v1/"), "m", "s", documents, state=state)
        assert (report.skipped, report.done) == (documents[:1], documents[1:])
        assert warm(Server(url), "m", "s", documents, state=state).skipped != []
        assert len(bodies) == 2
        assert warm(Server(url), "m", "another system prompt", documents, state=state).done != []


def test_what_fails_is_told_and_the_others_go_on(folder: Path) -> None:
    def picky(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if "first" in body["messages"][1]["content"]:
            return 400, {"error": {"message": "This model's maximum context length is 5 tokens"}}
        return 200, {}

    (folder / "empty.txt").write_text(" \n")
    with serving(picky) as (url, _):
        result = CliRunner().invoke(
            app,
            [
                "warm", "--server", url, "--model", "m", "--system", str(folder / "one.txt"),
                str(folder), str(folder / "three.bin"), str(folder / "none.txt"),
            ],
        )  # fmt: skip
    assert result.exit_code == 1
    assert "1 read in, 0 done before, 4 failed" in result.output


def test_no_server_and_bad_options_are_said() -> None:
    report = warm(Server("http://127.0.0.1:9", timeout=2), "m", "s", [Path(__file__)])
    assert "127.0.0.1:9" in report.failed[Path(__file__)]
    with pytest.raises(ValueError, match=r"must hold .document"):
        warm(Server("x"), "m", "s", [], template="nothing")
    with pytest.raises(ValueError, match="parallel=0"):
        warm(Server("x"), "m", "s", [], parallel=0)
