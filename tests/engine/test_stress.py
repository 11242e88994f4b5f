"""Eight threads at once, on a pool that is far too small and a real disk."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch

from lmcache.manager import LMCacheManager
from tests.engine.helpers import CHUNK, LAYERS, PagesConnector, kv_of, make_config, make_metadata, per_layer, tokens_of

THREADS, STEPS = 8, 400
FAMILIES = [tokens_of(4 * CHUNK, seed) for seed in range(4)]


class User(threading.Thread):
    """Does what requests do, in random order, and checks every byte that it gets."""

    def __init__(
        self, manager: LMCacheManager, connector: PagesConnector, index: int, together: threading.Barrier
    ) -> None:
        super().__init__()
        self.together = together
        self.engine = manager.engine
        self.connector = connector
        self.random = random.Random(index)
        # Pages of its own, as a running request has.
        self.slots = torch.arange(index * 6 * CHUNK, (index + 1) * 6 * CHUNK)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.together.wait(60)
            for _ in range(STEPS):
                getattr(self, self.random.choice(ACTIONS))(self.prompt())
        except BaseException as error:
            self.error = error

    def prompt(self) -> list[int]:
        base = self.random.choice(FAMILIES)
        tail = tokens_of(self.random.randrange(CHUNK), seed=self.random.randrange(3))
        return base[: self.random.randrange(1, len(base))] + tail

    def store(self, tokens: list[int]) -> None:
        self.engine.store(tokens, kv_of(tokens))

    def store_pages(self, tokens: list[int]) -> None:
        slots = self.slots[: len(tokens)]
        self.connector.pages[:, :, slots] = kv_of(tokens)
        self.engine.store(tokens, slot_mapping=slots)

    def store_layers(self, tokens: list[int]) -> None:
        steps = self.engine.store_layer(tokens)
        next(steps)
        for kv in per_layer(kv_of(tokens))[: self.random.randrange(LAYERS + 1)]:
            steps.send(kv)
        steps.close()

    def lookup(self, tokens: list[int]) -> None:
        assert 0 <= self.engine.lookup(tokens) <= len(tokens)

    def retrieve(self, tokens: list[int]) -> None:
        blob, found = self.engine.retrieve(tokens, return_tuple=False)
        count = int(found.sum())
        assert count == 0 or torch.equal(blob, kv_of(tokens)[:, :, :count])

    def retrieve_pages(self, tokens: list[int]) -> None:
        slots = self.slots[: len(tokens)]
        self.connector.pages[:, :, self.slots] = -1
        with self.engine.prefetch(tokens, paged=True) as lease:
            count = int(self.engine.retrieve(tokens, slot_mapping=slots, lease=lease).sum())
        assert torch.equal(self.connector.pages[:, :, slots[:count]], kv_of(tokens)[:, :, :count])
        assert bool((self.connector.pages[:, :, self.slots[count:]] == -1).all())

    def abort(self, tokens: list[int]) -> None:
        with ExitStack() as leases:
            for _ in range(3):
                leases.enter_context(self.engine.prefetch(tokens))

    def pin(self, tokens: list[int]) -> None:
        self.engine.pin(tokens)
        with suppress(StopIteration):
            next(self.engine.retrieve_layer(tokens))
        self.engine.unpin(tokens)

    def clear(self, tokens: list[int]) -> None:
        if self.random.random() < 0.1:
            self.engine.clear()


ACTIONS = [name for name in vars(User) if not name.startswith("_") and name not in ("run", "prompt")]


@pytest.mark.parametrize("policy", ["LRU", "S3FIFO"])
@pytest.mark.parametrize("local_cpu", [True, False])
def test_eight_threads(tmp_path: Path, policy: str, local_cpu: bool) -> None:
    connector = PagesConnector(num_slots=THREADS * 6 * CHUNK)
    config = make_config(
        max_local_cpu_size=160 / 1024 / 1024,  # 160 KiB: some 13 chunks of 12 KiB
        local_disk=tmp_path,
        max_local_disk_size=32 / 1024,
        local_cpu=local_cpu,
        cache_policy=policy,
        save_unfull_chunk=True,
    )
    with LMCacheManager(config, make_metadata(), connector) as manager:
        together = threading.Barrier(THREADS)
        users = [User(manager, connector, index, together) for index in range(THREADS)]
        for user in users:
            user.start()
        for user in users:
            user.join(120)
            assert not user.is_alive(), "a deadlock"
        for user in users:
            if user.error is not None:
                raise user.error
        assert manager.storage.flush(60)
        for stats in manager.stats().tiers.values():
            assert stats.used_bytes <= stats.capacity_bytes
        manager.engine.clear()
        assert manager.storage.flush(60)
        assert manager.storage.memory.pool.used_bytes == 0, "every reference is back"
        assert manager.engine._writes._under_way == set()
        assert manager.storage._pins == {}
        for stats in manager.stats().tiers.values():
            assert stats.entries == 0
