"""Managers of engines with other numbers of tensor-parallel ranks, with one shared store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from demo.fleet.redis_server import RedisServer
from lmcache.manager import LMCacheManager
from tests.engine.helpers import CHUNK, make_config, tokens_of
from tests.manager.test_rank_directories import rank_metadata

HEADS, LAYERS, DIM = 4, 2, 8
TOKENS = tokens_of(4 * CHUNK)
KV = torch.randn(LAYERS, 2, len(TOKENS), HEADS, DIM)


def ranks(stack: ExitStack, url: str, tp_size: int, **settings: object) -> list[LMCacheManager]:
    config = make_config(remote_url=url, remote_lookup_seconds=30.0, **settings)
    return [stack.enter_context(LMCacheManager(config, rank_metadata(rank, tp_size))) for rank in range(tp_size)]


def store(url: str, tp_size: int) -> None:
    with ExitStack() as stack:
        for manager, kv in zip(ranks(stack, url, tp_size), KV.chunk(tp_size, dim=3), strict=True):
            assert manager.engine.store(TOKENS, kv.contiguous()) == len(TOKENS)


@pytest.fixture(params=["file", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    if shutil.which("redis-server") is None:
        pytest.skip("apt-get install redis-server")
    with RedisServer(tmp_path) as server:
        yield server.url


@pytest.mark.parametrize(("kept_by", "wanted_by"), [(1, 2), (2, 1), (4, 2), (1, 4), (2, 2)])
def test_what_some_ranks_have_stored_others_find_byte_for_byte(url: str, kept_by: int, wanted_by: int) -> None:
    store(url, kept_by)
    with ExitStack() as stack:
        for manager, kv in zip(ranks(stack, url, wanted_by), KV.chunk(wanted_by, dim=3), strict=True):
            assert manager.engine.lookup(TOKENS) == len(TOKENS)
            found, mask = manager.engine.retrieve(TOKENS, return_tuple=False)
            assert isinstance(found, torch.Tensor)
            assert bool(mask.all())
            assert torch.equal(found, kv)
            tier = "remote" if kept_by == wanted_by else "resharded"
            assert manager.stats().reused_tokens[tier] == len(TOKENS)


def test_a_damaged_part_is_a_miss_and_is_counted(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    store(url, 2)
    chunks = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.stat().st_size > 4096]
    for path in chunks[:1]:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 0xFF
        path.write_bytes(raw)
    with ExitStack() as stack:
        (manager,) = ranks(stack, url, 1)
        assert manager.engine.lookup(TOKENS) == len(TOKENS), "nothing is known of the damage yet"
        found, mask = manager.engine.retrieve(TOKENS, return_tuple=False)
        assert isinstance(found, torch.Tensor)
        reused = int(mask.sum())
        assert reused < len(TOKENS)
        assert torch.equal(found[:, :, :reused], KV[:, :, :reused])
        assert manager.stats().tiers["remote"].failures == {"read_checksum": 1}
        assert manager.engine.lookup(TOKENS) < len(TOKENS)


def test_what_is_found_goes_to_the_disk_and_not_to_the_store_again(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    store(url, 2)
    before = sorted((tmp_path / "store").rglob("*"))
    disk = {"local_disk": tmp_path / "disk", "max_local_disk_size": 64 / 1024}
    with ExitStack() as stack:
        (manager,) = ranks(stack, url, 1, **disk)
        assert manager.engine.retrieve(TOKENS)[1].all()
        assert manager.storage.flush(60)
        assert manager.stats().tiers["disk"].entries == len(TOKENS) // CHUNK
    assert sorted((tmp_path / "store").rglob("*")) == before


def test_another_tenant_finds_nothing(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    store(url, 2)
    with ExitStack() as stack:
        (manager,) = ranks(stack, url, 1)
        assert manager.engine.lookup(TOKENS, cache_salt="another") == 0
