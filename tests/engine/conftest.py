"""The engine suites run twice: with tiers in this process, and attached to a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.engine.makers import EngineMaker, InProcess, OnServer
from tests.server.processes import ServerProcess


@pytest.fixture(scope="session")
def server_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server") / "kv.sock", max_local_cpu_size=8 / 1024) as server:
        yield server
        said = server.stop()
        assert "Traceback" not in said, said


@pytest.fixture(params=["in process", "on a server"])
def make_engine(request: Any, tmp_path: Path) -> Iterator[EngineMaker]:
    """Makes engines as :func:`tests.engine.helpers.make_engine` does."""
    with ExitStack() as after:
        if request.param == "in process":
            yield InProcess()
        else:
            yield after.enter_context(OnServer(request.getfixturevalue("server_process").socket, tmp_path / "own.sock"))
