"""What vLLM's users write as host and port, as a socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache.server.address import default_socket, socket_for
from lmcache.server.serve import open_server
from tests.engine.helpers import make_config


@pytest.fixture(autouse=True)
def runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.mark.parametrize("host", [None, "localhost", "tcp://localhost", "tcp://127.0.0.1", "0.0.0.0"])
def test_this_host(host) -> None:
    assert socket_for(host) == socket_for(host, "5555") == default_socket()
    assert socket_for(host, 6000).name == "server-6000.sock"


@pytest.mark.parametrize("host", ["/run/kv.sock", "unix:///run/kv.sock", "ipc:///run/kv.sock"])
def test_a_path(host) -> None:
    assert socket_for(host, 5555) == Path("/run/kv.sock")


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="remote_url"):
        socket_for("tcp://10.0.0.7")
    with pytest.raises(ValueError, match="number"):
        socket_for("localhost", "many")


def test_a_codec_that_is_not_exact_is_refused(tmp_path: Path) -> None:
    config = make_config(remote_url=f"file://{tmp_path}", remote_codec="fp8")
    with pytest.raises(ValueError, match="exact"):
        open_server(config, tmp_path / "kv.sock")


def test_two_servers_do_not_share_a_socket(here) -> None:
    with pytest.raises(FileExistsError, match="another server"):
        open_server(make_config(), here.path)
