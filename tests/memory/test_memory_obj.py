from __future__ import annotations

import threading

import pytest
import torch

from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec

SPEC = KVSpec(shape=(2, 2, 5, 3, 8), dtype=torch.bfloat16, layout="token-major-1", num_tokens=5)


@pytest.fixture
def pool():
    pool = SlabAllocator(1 << 20)
    yield pool
    pool.close()


def test_views(pool):
    with pool.allocate(SPEC) as obj:
        assert obj.bytes.shape == (SPEC.nbytes,)
        assert obj.padded_bytes.shape == (4096,)
        assert (obj.tensor.shape, obj.tensor.dtype) == (SPEC.shape, SPEC.dtype)
        obj.tensor.fill_(1.0)
        assert bool((obj.bytes.view(torch.bfloat16) == 1.0).all())


def test_the_last_reference_gives_the_bytes_back(pool):
    obj = pool.allocate(SPEC)
    assert obj.ref_up() is obj
    obj.ref_down()
    assert pool.used_bytes == 4096
    obj.ref_down()
    assert pool.used_bytes == 0


@pytest.mark.parametrize(
    "use",
    [lambda o: o.bytes, lambda o: o.padded_bytes, lambda o: o.tensor, lambda o: o.ref_up(), lambda o: o.ref_down()],
)
def test_use_after_the_last_reference_is_refused(pool, use):
    obj = pool.allocate(SPEC)
    obj.ref_down()
    with pytest.raises(RuntimeError, match="given back"):
        use(obj)
    assert pool.stats().objects == 0


def test_references_are_counted_across_threads(pool):
    obj = pool.allocate(SPEC)

    def work() -> None:
        for _ in range(2_000):
            with obj.ref_up():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert obj.ref_count == 1
    obj.ref_down()
    assert pool.used_bytes == 0
