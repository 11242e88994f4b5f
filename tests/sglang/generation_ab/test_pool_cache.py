"""Loads against a model of what must be in the slots."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.integration.sglang.sglang_adapter import LMCacheConnector, LoadMetadata, StoreMetadata
from tests.sglang.generation_ab.small_model import model_config
from tests.sglang.generation_ab.true_kv import true_kv

LAYERS, HEADS, DIM, SLOTS = 3, 2, 4, 160


@given(data=st.data())
def test_the_number_returned_is_what_sglang_may_keep(data: st.DataObject) -> None:
    page = data.draw(st.sampled_from([1, 2, 4, 16]), "page size")
    chunk = data.draw(st.integers(1, 24), "chunk size")
    stored = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=100), "stored prompt")
    shared = data.draw(st.integers(0, len(stored)), "shared with it")
    wanted = stored[:shared] + data.draw(st.lists(st.integers(0, 3), max_size=40), "and then")
    wanted = wanted[: len(wanted) // page * page]
    resident = data.draw(st.integers(0, len(wanted) // page), "resident pages") * page
    skipped = data.draw(st.integers(0, len(stored)), "not stored") // chunk * chunk
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("LMCACHE_CHUNK_SIZE", str(chunk))
        patch.setenv("LMCACHE_SAVE_UNFULL_CHUNK", str(data.draw(st.booleans(), "partial chunks")))
        patch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.01")
        patch.setattr("lmcache.integration.sglang.server_settings.page_size", lambda: page)
        k_pool, v_pool = ([torch.zeros(SLOTS, HEADS, DIM, dtype=torch.bfloat16) for _ in range(LAYERS)] for _ in "KV")
        connector = LMCacheConnector(model_config(Path(folder)), 1, 0, k_pool, v_pool)
        try:
            slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(len(stored)))[: len(stored)]
            kv = true_kv(stored, LAYERS, HEADS, DIM, torch.bfloat16)
            for layer in range(LAYERS):
                k_pool[layer][slots], v_pool[layer][slots] = kv[layer, 0], kv[layer, 1]
            given_slots = slots[skipped:] if data.draw(st.booleans(), "slots from the offset on") else slots
            connector.store_kv(StoreMetadata(None, stored, given_slots.to(torch.int32), skipped))

            fresh = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(7))[: len(wanted) - resident]
            for pool in [*k_pool, *v_pool]:
                pool.fill_(99)
            pad = resident % chunk
            mapping = torch.cat([torch.full((resident,), -1), fresh])
            count = connector.load_kv(LoadMetadata(wanted, mapping, resident - pad))

            assert count == 0 or count > pad
            loaded = max(0, count - pad)
            assert loaded % page == 0
            assert loaded <= len(fresh)
            expected = true_kv(wanted, LAYERS, HEADS, DIM, torch.bfloat16)[:, :, resident : resident + loaded]
            for layer in range(LAYERS):
                assert torch.equal(k_pool[layer][fresh[:loaded]], expected[layer, 0])
                assert torch.equal(v_pool[layer][fresh[:loaded]], expected[layer, 1])
            untouched = torch.ones(SLOTS, dtype=torch.bool)
            untouched[fresh] = False
            assert all(bool((pool[untouched] == 99).all()) for pool in [*k_pool, *v_pool])
            if skipped == 0 and resident == 0 and wanted[:shared] == wanted:
                assert loaded >= len(wanted) // chunk * chunk // page * page, "a whole chunk was missed"
        finally:
            connector.close()
