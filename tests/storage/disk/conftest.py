from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage.disk.helpers import Heap


@pytest.fixture
def heap() -> Iterator[Heap]:
    """Fails the test when a reference was not given back."""
    heap = Heap()
    yield heap
    assert heap.live == 0
