"""The disk of an engine whose number of ranks changes from start to start."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmcache.config.schema import GIB
from lmcache.manager import LMCacheManager
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.storage.disk import lock
from lmcache.storage.disk.rank_directories import RankDirectory, open_foreign
from lmcache.storage.disk.settings import DiskSettings
from lmcache.storage.policies.lru import LRUPolicy
from tests.engine.helpers import CHUNK, make_config, make_metadata, tokens_of
from tests.storage.disk.helpers import Heap

HEADS, LAYERS, DIM = 4, 2, 8
TOKENS = tokens_of(4 * CHUNK)
KV = torch.randn(LAYERS, 2, len(TOKENS), HEADS, DIM)


def rank_metadata(rank: int, tp_size: int) -> LMCacheEngineMetadata:
    return make_metadata(
        kv_shape=(LAYERS, 2, CHUNK, HEADS // tp_size, DIM),
        kv_dtype=torch.float32,
        tp_rank=rank,
        tp_size=tp_size,
        world_size=tp_size,
        worker_id=rank,
    )


def ranks(stack: ExitStack, directory: Path, tp_size: int, disk_gib: float = 0.5) -> list[LMCacheManager]:
    managers = []
    for rank in range(tp_size):
        config = make_config(
            local_disk=str(RankDirectory.of(directory, rank, tp_size).path), max_local_disk_size=disk_gib / tp_size
        )
        managers.append(stack.enter_context(LMCacheManager(config, rank_metadata(rank, tp_size))))
    return managers


def store(directory: Path, tp_size: int) -> None:
    with ExitStack() as stack:
        for manager, kv in zip(ranks(stack, directory, tp_size), KV.chunk(tp_size, dim=3), strict=True):
            assert manager.engine.store(TOKENS, kv.contiguous()) == len(TOKENS)


def check_found(directory: Path, tp_size: int) -> None:
    with ExitStack() as stack:
        for manager, kv in zip(ranks(stack, directory, tp_size), KV.chunk(tp_size, dim=3), strict=True):
            found, mask = manager.engine.retrieve(TOKENS, return_tuple=False)
            assert bool(mask.all())
            assert torch.equal(found, kv)


@pytest.mark.parametrize(("kept_by", "wanted_by"), [(1, 2), (2, 1), (1, 4), (4, 1), (2, 4), (4, 2), (2, 2)])
def test_what_some_ranks_have_kept_others_find_byte_for_byte(kept_by: int, wanted_by: int, tmp_path: Path) -> None:
    store(tmp_path, kept_by)
    check_found(tmp_path, wanted_by)


def test_the_folder_of_one_rank_is_not_enough(tmp_path: Path) -> None:
    store(tmp_path, 2)
    shutil.rmtree(tmp_path / "rank-1-of-2")
    with ExitStack() as stack:
        (manager,) = ranks(stack, tmp_path, 1)
        assert manager.engine.lookup(TOKENS) == 0


def test_a_damaged_file_is_a_miss(tmp_path: Path) -> None:
    store(tmp_path, 2)
    for file in (tmp_path / "rank-1-of-2").glob("??/*"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        file.write_bytes(raw)
    with ExitStack() as stack:
        (manager,) = ranks(stack, tmp_path, 1)
        assert manager.engine.lookup(TOKENS) == len(TOKENS), "nothing is known of the damage yet"
        _, mask = manager.engine.retrieve(TOKENS)
        assert not bool(mask.any())
        assert manager.stats().tiers["resharded"].failures


def test_a_directory_that_another_server_writes_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(tmp_path, 2)
    with ExitStack() as stack, caplog.at_level(logging.WARNING):
        ranks(stack, tmp_path, 2)
        (manager,) = ranks(stack, tmp_path, 1)
        assert manager.engine.lookup(TOKENS) == 0
        assert "chunks of rank 1 of 2 are not used" in caplog.text
        assert "resharded" not in manager.stats().tiers


def test_who_reads_a_folder_lets_others_read_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first may evict from it; nobody waits to do so behind it."""
    store(tmp_path, 2)
    found = RankDirectory.of(tmp_path, 0, 2)
    first = open_foreign(found, DiskSettings(tmp_path, GIB), Heap().allocate, LRUPolicy)
    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=time.monotonic))  # no sleep
    second = open_foreign(found, DiskSettings(tmp_path, GIB), Heap().allocate, LRUPolicy)
    for tier in (first, second):
        assert tier is not None
        tier.close()


def test_what_is_cleared_is_not_found_in_foreign_folders_either(tmp_path: Path) -> None:
    store(tmp_path, 2)
    with ExitStack() as stack:
        (manager,) = ranks(stack, tmp_path, 1)
        assert manager.engine.lookup(TOKENS) == len(TOKENS)
        manager.engine.clear()
        assert manager.engine.lookup(TOKENS) == 0


def test_together_they_take_no_more_than_the_disk_may(tmp_path: Path) -> None:
    """Old folders are cut down to one half, the ranks share the other."""
    limit_gib = 0.1
    store(tmp_path, 1)
    with ExitStack() as stack:
        capacities = [
            tier.capacity_bytes
            for manager in ranks(stack, tmp_path, 2, limit_gib)
            for name, tier in manager.stats().tiers.items()
            if name == "disk"
        ]
    assert len(capacities) == 2
    assert sum(capacities) <= limit_gib / 2 * GIB


def test_folders_are_told_by_their_names(tmp_path: Path) -> None:
    own = RankDirectory.of(tmp_path, 1, 4)
    assert RankDirectory.at(own.path) == own
    assert RankDirectory.at(RankDirectory.of(tmp_path, 0, 1).path) == (0, 1, tmp_path)
    assert own.foreign() == []
