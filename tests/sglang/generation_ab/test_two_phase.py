"""``LMCacheMPConnector``: what is held between a look-up and its load."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmcache.integration.sglang.lookup_leases import LookupLeases
from lmcache.integration.sglang.multi_process_adapter import LMCacheMPConnector
from lmcache.integration.sglang.sglang_adapter import LoadMetadata, StoreMetadata
from lmcache.lease import PrefixLease
from tests.sglang.generation_ab.small_model import SLOTS, model_config, pools

TOKENS = array("q", range(40))


@pytest.fixture
def connector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LMCacheMPConnector]:
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "8")
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.01")
    monkeypatch.setattr("lmcache.integration.sglang.utils._config_files", [])
    k_pool, v_pool = pools()
    connector = LMCacheMPConnector(model_config(tmp_path), 1, 0, k_pool, v_pool, page_size=4)
    connector.store_kv(StoreMetadata(None, TOKENS, torch.arange(40, dtype=torch.int32), 0, request_id="first"))
    yield connector
    connector.close()


def load(connector: LMCacheMPConnector, resident: int, count: int, request_id: str = "r") -> int:
    slots = torch.cat([torch.full((resident,), -1), torch.arange(50 + resident, 50 + count)])
    pad = resident % 8
    return connector.retrieve_kv(LoadMetadata(TOKENS, slots, resident - pad, prefix_pad=pad, request_id=request_id))


def test_what_was_looked_up_survives_eviction_until_it_is_loaded(connector: LMCacheMPConnector) -> None:
    assert connector.lookup_kv(TOKENS, "r") == 40
    connector.reset()
    assert load(connector, 12, 40) == 40 - 8
    assert len(connector._leases) == 0
    assert load(connector, 12, 40) == 0


@pytest.mark.parametrize("end", ["release_pending", "end_session"])
def test_letting_go_is_idempotent(connector: LMCacheMPConnector, end: str) -> None:
    assert connector.lookup_kv(TOKENS, "r") == 40
    for _ in range(3):
        getattr(connector, end)("r")
    getattr(connector, end)("unknown")
    assert len(connector._leases) == 0
    assert load(connector, 0, 40) == 40, "a load without a look-up finds what is there"


def test_a_request_that_is_looked_up_again_holds_once(connector: LMCacheMPConnector) -> None:
    for _ in range(5):
        assert connector.lookup_kv(TOKENS, "r") == 40
    assert len(connector._leases) == 1
    connector.end_session("r")


def test_fewer_slots_than_tokens(connector: LMCacheMPConnector) -> None:
    """SGLang asks for as many slots as the look-up gave, and passes the whole prompt along."""
    assert connector.lookup_kv(TOKENS, "r") == 40
    assert load(connector, 4, 30) == 28, "30 slots, whole pages"


def test_aborted_while_queued(connector: LMCacheMPConnector) -> None:
    """SGLang never speaks of such a request again."""
    now = [0.0]
    connector._leases = LookupLeases(60, clock=lambda: now[0])
    connector.lookup_kv(TOKENS, "aborted")
    now[0] = 59
    connector.lookup_kv(TOKENS, "waiting")
    assert len(connector._leases) == 2
    now[0] = 61
    connector.store_kv(StoreMetadata(None, TOKENS, torch.arange(40), 0))
    assert len(connector._leases) == 1
    now[0] = 200
    assert load(connector, 0, 40, "waiting") == 40, "looked up again"


def test_leases_in_the_order_of_their_age() -> None:
    now = [0.0]
    leases = LookupLeases(10, clock=lambda: now[0])
    for second, name in enumerate("abca"):
        now[0] = second
        leases.hold(name, PrefixLease([]))
    now[0] = 11.5  # b, of second 1, is too old; a was renewed in second 3
    leases.release_old()
    assert leases.take("b") is None
    assert leases.take("a") is not None
    assert leases.take("a") is None
    leases.release_all()
    assert len(leases) == 0


@pytest.mark.parametrize("tokens", [[-1] * 16, [2**40] * 16, ["x"] * 16, [(1, 2)] * 16, None, []])
def test_tokens_that_are_none(connector: LMCacheMPConnector, tokens: object) -> None:
    assert connector.lookup_kv(tokens, "r") == 0  # type: ignore[arg-type]
    assert connector.retrieve_kv(LoadMetadata(tokens, torch.arange(16), 0, request_id="r")) == 0  # type: ignore[arg-type]
    connector.store_kv(StoreMetadata(None, tokens, torch.arange(16), 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [torch.arange(SLOTS, SLOTS + 40), torch.arange(3), torch.full((40,), -7), None])
def test_slots_that_are_none(connector: LMCacheMPConnector, slots: torch.Tensor) -> None:
    before = [pool.clone() for pool in connector._cache.engine.gpu_connector.tensors]  # type: ignore[union-attr]
    assert connector.retrieve_kv(LoadMetadata(TOKENS, slots, 0, request_id="r")) == 0
    connector.store_kv(StoreMetadata(None, array("q", range(100, 140)), slots, 0))
    assert connector.lookup_kv(array("q", range(100, 140)), "s") == 0
    assert all(map(torch.equal, before, connector._cache.engine.gpu_connector.tensors))  # type: ignore[union-attr]
