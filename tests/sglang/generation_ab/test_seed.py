"""The public interface as its page shows it, without any SGLang."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache.integration.sglang.multi_process_adapter import LMCacheMPConnector
from lmcache.integration.sglang.sglang_adapter import (
    LMCacheConnector,
    LMCacheLayerwiseConnector,
    LoadMetadata,
    StoreMetadata,
    init_lmcache_engine,
)
from lmcache.integration.sglang.utils import last_config_file, lmcache_get_config
from tests.sglang.generation_ab.small_model import DIM, HEADS, LAYERS, model_config, pools


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "4")
    monkeypatch.setenv("LMCACHE_SAVE_UNFULL_CHUNK", "true")
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.01")
    monkeypatch.setenv("LMCACHE_ENABLE_KV_EVENTS", "true")


def spoil(*pools: list[torch.Tensor]) -> None:
    for pool in pools:
        for tensor in pool:
            tensor.zero_()


def test_the_usage_example(tmp_path: Path) -> None:
    model, (k_pool_tensors, v_pool_tensors) = model_config(tmp_path), pools()
    index_tensor, slot_tensor = torch.arange(10, 15), torch.arange(40, 45)
    expected = [tensor[10:15].clone() for tensor in [*k_pool_tensors, *v_pool_tensors]]

    connector = LMCacheConnector(
        sgl_config=model,
        tp_size=1,
        rank=0,
        k_pool=k_pool_tensors,
        v_pool=v_pool_tensors,
    )
    load_meta = LoadMetadata(
        token_ids=[1, 2, 3, 4, 5],
        slot_mapping=slot_tensor,
        offset=0,
    )
    assert connector.load_kv(load_meta) == 0
    store_meta = StoreMetadata(
        last_node=None,
        token_ids=[1, 2, 3, 4, 5],
        kv_indices=index_tensor,
        offset=0,
    )
    connector.store_kv(store_meta)

    assert [event.token_ids for event in connector.get_kv_events()] == [[1, 2, 3, 4], [5]]
    spoil(k_pool_tensors, v_pool_tensors)
    assert connector.load_kv(load_meta) == 5
    loaded = [tensor[40:45] for tensor in [*k_pool_tensors, *v_pool_tensors]]
    assert all(map(torch.equal, loaded, expected))
    connector.reset()
    assert connector.load_kv(load_meta) == 0
    connector.close()
    connector.store_kv(store_meta)
    assert connector.load_kv(load_meta) == 0
    assert connector.chunk_size() == 4


def test_layerwise_as_sglangs_own_unit_test_calls_it(tmp_path: Path) -> None:
    k_pool, v_pool = pools()
    connector = LMCacheLayerwiseConnector(model_config(tmp_path), 1, 0, k_pool, v_pool, config_file="")
    tokens, slots = list(range(16)), torch.randperm(64)[:16]
    expected = [tensor[slots] for tensor in [*k_pool, *v_pool]]
    assert connector.start_load_kv(LoadMetadata(token_ids=tokens, slot_mapping=slots, offset=0)) == 0
    connector.store_kv(StoreMetadata(last_node=None, token_ids=tokens, kv_indices=slots, offset=0))
    spoil(k_pool, v_pool)
    assert connector.start_load_kv(LoadMetadata(token_ids=tokens, slot_mapping=slots, offset=0)) == 16
    for layer in [*range(LAYERS), 0, LAYERS - 1]:
        connector.load_kv_layerwise(layer)
        connector.load_kv_layerwise(layer)
    assert all(map(torch.equal, [tensor[slots] for tensor in [*k_pool, *v_pool]], expected))
    assert connector.global_min_tokens(7, None, torch.device("cpu")) == 7
    connector.close()


def test_init_lmcache_engine(tmp_path: Path) -> None:
    engine = init_lmcache_engine(model_config(tmp_path), 1, 0, 0, torch.bfloat16)
    assert engine.metadata.kv_shape == (LAYERS, 2, 4, HEADS, DIM)
    engine.close()


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (StoreMetadata, "last_node token_ids kv_indices offset"),
        (LoadMetadata, "token_ids slot_mapping offset"),
        (init_lmcache_engine, "model_config tp_size local_rank global_rank kv_dtype"),
        (LMCacheConnector, "sgl_config tp_size rank k_pool v_pool"),
        (LMCacheLayerwiseConnector, "sgl_config tp_size rank k_pool v_pool tp_group"),
        (LMCacheConnector.load_kv, "self load_metadata"),
        (LMCacheConnector.store_kv, "self store_metadata"),
        (LMCacheLayerwiseConnector.global_min_tokens, "self local_tokens tp_group device"),
        (LMCacheLayerwiseConnector.load_kv_layerwise, "self layer_id"),
        (LMCacheLayerwiseConnector.start_load_kv, "self load_metadata"),
    ],
)
def test_signatures(function: Any, names: str) -> None:
    expected = names.split()
    assert list(inspect.signature(function).parameters)[: len(expected)] == expected


def test_what_later_versions_may_add_is_accepted(tmp_path: Path) -> None:
    k_pool, v_pool = pools()
    pool_arguments: dict[str, Any] = {"sgl_config": model_config(tmp_path), "tp_size": 1, "rank": 0}
    pool_arguments |= {"k_pool": k_pool, "v_pool": v_pool, "from_the_future": object()}
    StoreMetadata(None, [1], torch.tensor([1]), 0, request_id="r", from_the_future=1)
    LoadMetadata([1], torch.tensor([1]), 0, prefix_pad=0, request_id="r", from_the_future=1)
    LMCacheConnector(**pool_arguments).close()
    LMCacheLayerwiseConnector(**pool_arguments, config_file="").close()
    LMCacheMPConnector(**pool_arguments, page_size=1, host="localhost", port=5555).close()


def test_the_config_file_reaches_the_two_phase_connector(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text("mp_host: elsewhere\nmp_port: 1234\nchunk_size: 8\n")
    address = lmcache_get_config(str(file))
    assert (address.mp_host, address.mp_port, last_config_file()) == ("elsewhere", 1234, str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LMCACHE_CHUNK_SIZE")
        k_pool, v_pool = pools()
        connector = LMCacheMPConnector(model_config(tmp_path), 1, 0, k_pool, v_pool, page_size=1)
        assert connector.chunk_size() == 8
        connector.close()


def test_a_config_file_that_is_not_there_is_said_at_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lmcache-config-file .* cannot be read"):
        lmcache_get_config(tmp_path / "missing.yaml")
