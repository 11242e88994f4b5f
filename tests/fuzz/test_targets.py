"""The targets of the fuzzer hold for bytes that hypothesis thinks of; the fuzzer itself is ``make fuzz``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("zstandard")

from tests.fuzz.targets import FORMATS, TARGETS, VALUES, redis_reply, taken


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=600))
def test_any_bytes(target: Callable[[bytes], None], data: bytes) -> None:
    target(data)


def test_a_number_that_is_none_leaves_the_connection_unclean() -> None:
    """Found by the fuzzer: such a reply counted as read, so the connection was kept."""
    redis_reply(b"\x00+O$K\r\n:1\x05\x01$5\r\n")


def test_what_was_written_is_taken() -> None:
    assert all(taken(format_, value) is not None for format_, value in zip(FORMATS, VALUES, strict=True))
