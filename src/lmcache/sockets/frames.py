"""Messages over a stream socket: four bytes of length, little-endian, and so many bytes of msgpack."""

from __future__ import annotations

import os
import socket
import struct

_LENGTH = struct.Struct("<I")

MAX_FRAME_BYTES = 64 << 20
"""A prompt of a million tokens, as token ids, takes 5 MB."""


class ConnectionLostError(ConnectionError):
    """The other side is gone, or does not speak our protocol."""


def _frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


def send_frame(connection: socket.socket, payload: bytes) -> None:
    """Raises:
    OSError: the other side is gone, or took nothing within the socket's timeout.
    """
    connection.sendall(_frame(payload))


def receive_frame(connection: socket.socket) -> bytes:
    """The next payload.

    Raises:
        ConnectionLostError: the stream has ended, or the frame is larger than any of ours.
        TimeoutError: nothing came within the socket's timeout. Part of a frame may have been read then: the connection
            is of no further use.
    """
    return _payload(connection, _exactly(connection, _LENGTH.size))


def _payload(connection: socket.socket, head: bytes) -> bytes:
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise ConnectionLostError(f"a frame of {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise ConnectionLostError("the other side has closed the connection")
        data += part
    return bytes(data)


def send_descriptor(connection: socket.socket, payload: bytes, descriptor: int) -> None:
    """:func:`send_frame` with an open file, of which the other side gets a descriptor of its own."""
    frame = _frame(payload)
    sent = socket.send_fds(connection, [frame], [descriptor])
    connection.sendall(frame[sent:])


def receive_descriptor(connection: socket.socket) -> tuple[bytes, int | None]:
    """The next payload, and the open file that came with it, which is the caller's to close; errors as in
    :func:`receive_frame`."""
    head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    descriptor = descriptors[0] if descriptors else None
    try:
        if not head:
            raise ConnectionLostError("the other side has closed the connection")
        return _payload(connection, head + _exactly(connection, _LENGTH.size - len(head))), descriptor
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
