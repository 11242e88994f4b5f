"""The connector over small pools on the CPU, called as SGLang calls it, without SGLang."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache.integration.sglang.lmcache_mp_metadata import LMCacheExternalFlow
from lmcache.integration.sglang.unified_lmcache_mp_connector import UnifiedLMCacheMPConnector
from tests.sglang.generation_ab.true_kv import true_kv

LAYERS, HEADS, DIM, SLOTS, CHUNK, DTYPE = 3, 2, 4, 512, 16, torch.bfloat16


class World:
    """Slots are never given back: each prompt gets fresh ones."""

    def __init__(self, page_size: int = 1, device: str = "cpu", **arguments: Any) -> None:
        self.keys, self.values = (
            [torch.zeros(SLOTS, HEADS, DIM, dtype=DTYPE, device=device) for _ in range(LAYERS)] for _ in range(2)
        )
        self.device = device
        self.page_size = page_size
        self._used = page_size  # the first page is SGLang's padding
        pools = SimpleNamespace(k_buffer=self.keys, v_buffer=self.values, dtype=DTYPE)
        config = SimpleNamespace(to_dict=lambda: {"model_type": "llama"})
        given: dict[str, Any] = {
            "config_file": None,
            "model_config": SimpleNamespace(model_path="some/model", hf_text_config=config, dtype=DTYPE),
            "tp_size": 1,
            "tp_rank": 0,
            "tp_group": None,
            "page_size": page_size,
            "token_to_kv_pool_allocator": SimpleNamespace(get_kvcache=lambda: pools),
            "req_to_token_pool": None,
            "tree_components": (SimpleNamespace(value="full"),),
            "mamba_component": None,
            "sliding_window_size": None,
        }
        self.connector = UnifiedLMCacheMPConnector(**{**given, **arguments})

    def slots(self, count: int) -> torch.Tensor:
        self._used += count
        assert self._used <= SLOTS
        return torch.arange(self._used - count, self._used, device=self.device)

    def kv(self, tokens: Sequence[int]) -> torch.Tensor:
        return true_kv(tokens, LAYERS, HEADS, DIM, DTYPE).to(self.device)

    def write(self, kv: torch.Tensor, slots: torch.Tensor) -> None:
        """As a forward does."""
        for layer in range(LAYERS):
            self.keys[layer][slots], self.values[layer][slots] = kv[layer, 0], kv[layer, 1]

    def holds(self, tokens: Sequence[int], slots: torch.Tensor, start: int = 0) -> bool:
        """Whether ``slots`` have the KV of ``tokens[start:]``."""
        kv = self.kv(tokens)[:, :, start : start + len(slots)]
        return all(
            torch.equal(self.keys[layer][slots], kv[layer, 0]) and torch.equal(self.values[layer][slots], kv[layer, 1])
            for layer in range(LAYERS)
        )

    def store(self, rid: str, tokens: Sequence[int], salt: str = "") -> Any:
        """As SGLang does when ``tokens`` are computed: whole chunks behind what it thinks is kept."""
        count = len(tokens) // CHUNK * CHUNK
        start = self.connector.get_store_start(rid, count)
        if start >= count:
            return None
        slots = self.slots(count)
        self.write(self.kv(tokens[:count]), slots)
        groups = self.connector.device_indices_by_group(slots[start:], mamba_value=None)
        return self.connector.submit_store(rid, tokens[:count], groups, device_indices_start=start, cache_salt=salt)

    def stored(self, rid: str, tokens: Sequence[int], salt: str = "") -> None:
        operation = self.store(rid, tokens, salt)
        if operation is not None:
            wait(lambda: self.connector.ready_prefix_count([operation]) == 1)
            self.connector.complete_store(operation)
        self.connector.finish_request(rid)

    def look(self, rid: str, tokens: Sequence[int], salt: str = "") -> tuple[Any, int]:
        """A look-up and what it found."""
        lookup = self.connector.submit_lookup(rid, tokens, local_hit_tokens=0, cache_salt=salt)
        LMCacheExternalFlow(key=None, lookup=lookup)
        wait(lambda: self.connector.poll_lookup(lookup) is not None)
        hit = self.connector.poll_lookup(lookup)
        assert hit is not None
        return lookup, hit

    def load(self, lookup: Any, hit: int, local: int = 0) -> tuple[bool, torch.Tensor]:
        """Whether the tokens behind the first ``local`` were loaded, and where."""
        slots = self.slots(hit - local)
        load = self.connector.submit_load(
            lookup,
            self.connector.device_indices_by_group(slots, mamba_value=None, mamba_transfer_tokens=hit),
            local_hit_tokens=local,
            owned_device_indices=slots,
            producer_stream=None,
        )
        if not self.connector.prepare_load_on_stream(load, None):
            return False, slots
        wait(lambda: self.connector.ready_prefix_count([load]) == 1)
        return self.connector.complete_load(load), slots

    def failures(self) -> float:
        counts = self.connector.metrics.snapshot().items()
        return sum(value for name, value in counts if name.startswith("lmcache_failures_total"))


@contextmanager
def small_world(
    patch: pytest.MonkeyPatch, page_size: int = 1, make: Callable[..., World] = World, **options: Any
) -> Iterator[World]:
    """``options`` are our configuration."""
    for name, value in {"chunk_size": CHUNK, "max_local_cpu_size": 0.01, **options}.items():
        patch.setenv(f"LMCACHE_{name.upper()}", str(value))
    world = make(page_size)
    try:
        yield world
    finally:
        world.connector.close()


def wait(until: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.001)
