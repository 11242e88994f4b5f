"""``Uploads`` by itself."""

from __future__ import annotations

import torch

from lmcache.memory.memory_obj import MemoryObj
from lmcache.storage.remote.uploads import Uploads
from tests.storage.conformance import SPEC, make_keys

(A,) = make_keys(1)


def test_whoever_waited_finds_every_reference_given_back() -> None:
    uploads = Uploads(1 << 20)
    buffer = torch.empty(SPEC.nbytes, dtype=torch.uint8)
    over_when_released: list[bool] = []
    for leave in (lambda: [uploads.end(key) for key, _ in uploads.take()], lambda: uploads.cancel(A)):
        obj = MemoryObj(SPEC, buffer, 0, release=lambda obj: over_when_released.append(uploads.wait(0)))
        uploads.add(A, obj)
        obj.ref_down()
        leave()
        assert uploads.wait(0)
    assert over_when_released == [False, False]
