from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmcache.observability import logging as ours
from lmcache.observability.logging import init_logger, log_limited


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ours, "time", clock)
    monkeypatch.setattr(ours, "_last_said", {})
    return clock


def test_one_line_a_key_and_interval(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    logger = init_logger("lmcache.test")
    for _ in range(3):
        log_limited(logger, logging.WARNING, "disk", "disk: %s", "full", interval=60.0)
        log_limited(logger, logging.WARNING, "net", "net")
    assert [record.getMessage() for record in caplog.records] == ["disk: full", "net"]
    clock.now += 60.0
    log_limited(logger, logging.WARNING, "disk", "disk: %s", "still full", interval=60.0)
    assert caplog.records[-1].getMessage() == "disk: still full"


def test_the_line_says_who_called_and_why(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    error = OSError("gone")
    log_limited(init_logger("lmcache.test"), logging.ERROR, "disk", "failed", exc_info=error)
    assert caplog.records[0].filename == "test_logging.py"
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is error


def test_threads_that_fail_together_say_it_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    logger = init_logger("lmcache.test")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: log_limited(logger, logging.WARNING, "disk", "full"), range(200)))
    assert len(caplog.records) == 1


def run(code: str, **environ: str) -> str:
    """What ``code`` writes to stderr, in a process whose logging nobody has configured yet."""
    preamble = "import logging, lmcache.observability.logging as ours; log = ours.init_logger('lmcache.x');"
    done = subprocess.run(
        [sys.executable, "-c", preamble + code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PATH": "", **environ},
    )
    return done.stderr


def test_a_library_by_itself_adds_no_handler() -> None:
    assert run("assert not logging.getLogger('lmcache').handlers; log.info('quiet')") == ""


def test_under_an_engine_our_lines_show_once() -> None:
    shown = run("ours.configure_for_engine(); ours.configure_for_engine(); log.info('hello'); log.debug('detail')")
    assert shown.count("hello") == 1
    assert "[lmcache.x]" in shown
    assert "detail" not in shown


def test_the_level_comes_from_the_environment() -> None:
    show = "ours.configure_for_engine(); log.debug('detail'); log.warning('warning')"
    assert "detail" in run(show, LMCACHE_LOG_LEVEL="debug")
    assert run(show, LMCACHE_LOG_LEVEL="ERROR") == ""
    assert "LMCACHE_LOG_LEVEL='LOUD' is not a log level" in run(show, LMCACHE_LOG_LEVEL="loud")


def test_handlers_of_the_application_are_used() -> None:
    shown = run("logging.basicConfig(format='app %(message)s'); ours.configure_for_engine(); log.info('hello')")
    assert shown == "app hello\n"


def test_a_level_that_the_application_set_stays() -> None:
    assert run("logging.getLogger('lmcache').setLevel('ERROR'); ours.configure_for_engine(); log.info('hello')") == ""
