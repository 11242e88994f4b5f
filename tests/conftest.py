from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.storage.conformance")

from tests.leaks import LeakDetector  # noqa: E402 - after the line above

# The machines that run this are slow and shared: no deadlines, and the same examples every time.
settings.register_profile("lmcache", deadline=None, derandomize=True)
settings.load_profile("lmcache")

_detector = LeakDetector()
_detector.install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fail a test that leaves references behind, once all of its fixtures are torn down."""
    try:
        yield
    finally:
        leaks = _detector.leaks()
    assert not leaks, f"{item.nodeid} leaked KV references:\n  " + "\n  ".join(leaks)


@pytest.fixture
def leak_detector() -> LeakDetector:
    return _detector
