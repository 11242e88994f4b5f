"""Copying what a lease holds, as it arrives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from lmcache.kv_ends import Parts, objs_and_ranges
from lmcache.lease import PrefixLease
from lmcache.paging.interface import GPUConnectorInterface


class Target(Protocol):
    def scatter(self, parts: Parts) -> None:
        """Copy each object to where its chunk belongs, every layer."""


def copy_arriving(lease: PrefixLease, target: Target, start: int, limit: int, timeout: float) -> int:
    """Copy the tokens ``[start, limit)`` of ``lease`` chunk by chunk, the first while the last are being read.

    Args:
        timeout: seconds after which the lease is cut to what has arrived.

    Returns:
        The end of what was copied; ``start`` when that is nothing.
    """
    deadline = time.monotonic() + timeout
    end, taken = start, 0
    while True:
        with lease.arrived(taken, deadline - time.monotonic()) as parts:
            if not parts:
                break
            taken += len(parts)
            wanted = _within(parts, start, limit)
            target.scatter(wanted)
            end = max([end, *(min(chunk.end, limit) for chunk, _ in wanted)])
    lease.cut()
    # A lease that lost its last chunks may have become shorter than it may be, and then counts as empty.
    return max(start, min(end, lease.num_tokens))


def send_ahead(lease: PrefixLease, connector: GPUConnectorInterface, start: int) -> None:
    """Before a :func:`copy_arriving` into pages: what has arrived of ``lease`` from token ``start`` on may be on its
    way to them. Never waits."""
    with lease.arrived(0, 0) as parts:
        connector.send_ahead(*objs_and_ranges(_within(parts, start, lease.num_tokens)))


@contextmanager
def all_arrived(lease: PrefixLease, start: int, limit: int, timeout: float) -> Iterator[tuple[Parts, int]]:
    """The chunks of ``lease`` with any of the tokens ``[start, limit)``, held until the block is left, and where the
    last of these tokens ends (at ``start`` when there are none)."""
    lease.wait(timeout)
    lease.cut()
    with lease.arrived(0, 0) as parts:
        wanted = _within(parts, start, limit)
        yield wanted, min(wanted[-1][0].end, limit) if wanted else start


def _within(parts: Parts, start: int, limit: int) -> Parts:
    return [(chunk, obj) for chunk, obj in parts if chunk.end > start and chunk.start < limit]
