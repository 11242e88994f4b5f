from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache.server.serve import open_server
from lmcache.server.server import CacheServer
from tests.engine.helpers import make_config


@pytest.fixture
def here(tmp_path: Path) -> Iterator[CacheServer]:
    """A server in this process: the detector of leaks sees its pool."""
    server = open_server(make_config(), tmp_path / "here.sock")
    yield server
    server.close()
