"""What is sent is what arrives; and nothing that arrives brings the server down."""

from __future__ import annotations

import random
import socket
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache.keys import PrefixKey, SegmentKey
from lmcache.memory.memory_obj import KVSpec
from lmcache.server import protocol as p
from lmcache.sockets.frames import receive_descriptor, receive_frame, send_frame
from tests.engine.helpers import kv_of, tokens_of
from tests.eventually import eventually
from tests.server.clients import manager_at

raw_keys = st.binary(min_size=48, max_size=48)


@given(st.lists(st.one_of(raw_keys.map(PrefixKey), raw_keys.map(SegmentKey)), max_size=8))
def test_keys_arrive_as_they_are(keys) -> None:
    call = p.calls.decode(p.encode(p.Find(p.Keys.of(keys))))
    decoded = call.keys.decode()
    assert decoded == keys
    assert [type(key) for key in decoded] == [type(key) for key in keys]


@given(st.binary(max_size=200), st.binary(max_size=400))
def test_other_bytes_are_no_keys(kinds, raw) -> None:
    try:
        keys = p.Keys(kinds, raw).decode()
    except ValueError:
        return
    assert len(keys) * 48 == len(raw)


def test_specs_are_written_once() -> None:
    first, second = KVSpec((2, 3), torch.float32, "a", 2), KVSpec((2, 4), torch.bfloat16, "a", 2)
    table = p.SpecTable()
    assert [table.add(spec) for spec in (first, second, first)] == [0, 1, 0]
    assert p.decode_specs(table.raw) == [first, second]


def attach(server) -> tuple[socket.socket, socket.socket]:
    events = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    events.settimeout(10)
    events.connect(str(server.path))
    send_frame(events, p.encode(p.Hello(p.PROTOCOL, 1)))
    _, descriptor = receive_descriptor(events)
    calls = socket.socket(fileno=descriptor)
    calls.settimeout(10)
    return events, calls


messages = [
    p.Find(p.Keys(b"\0", b"x" * 96)),
    p.Acquire(p.Keys(b"\1", b"x" * 48), 0, True),
    p.Allocate(b'{"shape":[1073741824,1073741824],"dtype":"float32","layout":"","num_tokens":1}'),
    p.Allocate(b'{"shape":[4,4],"dtype":"float32","layout":"x","num_tokens":4}'),
    p.Put(p.Keys(b"\0", b"x" * 48), 12345),
    p.Unpin(p.Keys(b"\0", b"x" * 48)),
    p.MapSlab(1 << 40),
    p.Release([1, 2, 1 << 50]),
    p.Publish([(b"a", b"b", b"c")]),
    p.Hello(1, 1),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_nonsense_disturbs_nobody_else(here, data) -> None:
    frames = data.draw(
        st.lists(
            st.one_of(
                st.binary(max_size=64),
                st.sampled_from(messages).map(p.encode),
                st.sampled_from(messages).map(p.encode).flatmap(
                    lambda raw: st.integers(0, len(raw)).map(lambda at: raw[:at] + b"\xff" + raw[at + 1 :])
                ),
            ),
            max_size=6,
        )
    )  # fmt: skip
    torn = data.draw(st.sampled_from([b"", b"\1", struct.pack("<I", 1 << 31), struct.pack("<I", 10) + b"abc"]))
    on_calls = data.draw(st.booleans())
    events, calls = attach(here)
    with events, calls:
        target = calls if on_calls else events
        try:
            for frame in frames:
                send_frame(target, frame)
            target.sendall(torn)
        except OSError:
            pass  # it has hung up
    assert eventually(lambda: here.clients == 0)
    tokens = tokens_of(32, random.Random(1).randrange(100))
    with manager_at(here.path) as manager:
        manager.engine.store(tokens, kv_of(tokens))
        blob, found = manager.engine.retrieve(tokens, return_tuple=False)
        assert bool(found.all())
        assert torch.equal(blob, kv_of(tokens))
    assert eventually(lambda: here.clients == 0)


def test_a_request_that_fails_is_refused_and_the_next_one_answered(here) -> None:
    events, calls = attach(here)
    with events, calls:
        for message, answer in [
            (p.Put(p.Keys(b"\0", b"x" * 48), 7), p.Refused),
            (p.Find(p.Keys(b"\0\0", b"x" * 48)), p.Refused),
            (messages[2], p.Acquired),
            (p.Find(p.Keys(b"\0", b"x" * 48)), p.Found),
        ]:
            send_frame(calls, p.encode(message))
            assert isinstance(p.replies.decode(receive_frame(calls)), answer)


def test_another_version_is_told_so(here) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as events:
        events.settimeout(10)
        events.connect(str(here.path))
        send_frame(events, p.encode(p.Hello(p.PROTOCOL + 1, 1)))
        assert isinstance(p.from_server.decode(receive_frame(events)), p.Goodbye)


def test_another_user_is_refused(here, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr("lmcache.server.server.peer_uid", lambda connection: 12345)
    with manager_at(here.path) as manager:
        assert manager.storage.client.attachment is None
        assert manager.engine.store(tokens_of(16), kv_of(tokens_of(16))) == 0
    assert "12345 was refused" in caplog.text


def test_only_this_user_may_open_the_socket(here) -> None:
    assert here.path.stat().st_mode & 0o777 == 0o600
