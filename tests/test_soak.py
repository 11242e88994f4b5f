"""What the soak counts from outside of a server is what the server holds."""

from __future__ import annotations

import gc
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache.storage.cpu import LocalCPUTier
from tests.storage.conformance import SPEC, make_keys

(A,) = make_keys(1)
held = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/soak/preload/sitecustomize.py"))["held"]


@pytest.fixture
def tier() -> Iterator[LocalCPUTier]:
    tier = LocalCPUTier(8 << 20, "LRU")
    obj = tier.allocate(SPEC)
    assert obj is not None
    with obj:
        tier.submit_put(A, obj)
    yield tier
    tier.close()


def counts(tier: LocalCPUTier) -> tuple[int, int]:
    gc.collect()  # tiers of other tests
    gc.freeze()  # as engines do
    found = held()
    return found["pins"], found["references"]


def test_an_idle_tier_has_none(tier: LocalCPUTier) -> None:
    assert counts(tier) == (0, 0)


def test_a_pin_and_a_reference_are_seen(tier: LocalCPUTier) -> None:
    tier.pin(A)
    assert counts(tier) == (1, 0)
    tier.unpin(A)
    obj = tier.get(A)
    assert obj is not None
    with obj:
        assert counts(tier) == (0, 1)


def test_an_object_that_no_entry_knows_is_seen(tier: LocalCPUTier) -> None:
    obj = tier.allocate(SPEC)
    assert obj is not None
    with obj:
        assert counts(tier) == (0, 1)
    assert counts(tier) == (0, 0)
