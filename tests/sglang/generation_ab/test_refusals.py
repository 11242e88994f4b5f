"""What these versions of SGLang cannot tell us, or we cannot serve: off, in words, and every call a miss."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache.integration.sglang.multi_process_adapter import LMCacheMPConnector
from lmcache.integration.sglang.sglang_adapter import LMCacheLayerwiseConnector, LoadMetadata, StoreMetadata
from tests.sglang.generation_ab.small_model import model_config, pools

Pools = tuple[list[torch.Tensor], list[torch.Tensor]]


def serve_nothing(folder: Path, pools: Pools) -> None:
    k_pool, v_pool = pools
    tokens, slots = array("q", range(600)), torch.arange(600) % 64
    layerwise = LMCacheLayerwiseConnector(model_config(folder), 1, 0, k_pool, v_pool)
    two_phase = LMCacheMPConnector(model_config(folder), 1, 0, k_pool, v_pool, page_size=1)
    for connector in (layerwise, two_phase):
        assert connector.chunk_size() == 256
        connector.store_kv(StoreMetadata(None, tokens, slots, 0))
        assert connector.get_kv_events() == []
        connector.reset()
    assert layerwise.start_load_kv(LoadMetadata(tokens, slots, 0)) == 0
    assert two_phase.lookup_kv(tokens, "r") == 0
    assert two_phase.retrieve_kv(LoadMetadata(tokens, slots, 0, request_id="r")) == 0
    layerwise.load_kv_layerwise(0)
    two_phase.end_session("r")
    for connector in (layerwise, two_phase):
        connector.close()
        connector.close()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"speculative_algorithm": "EAGLE"}, "EAGLE"), ({"enable_lora": True}, "LoRA"), ({"lora_paths": ["x"]}, "LoRA")],
)
def test_servers_whose_requests_differ_in_more_than_tokens(
    arguments: dict[str, Any],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = SimpleNamespace(page_size=1, **arguments)
    monkeypatch.setitem(sys.modules, "sglang.srt.server_args", SimpleNamespace(get_global_server_args=lambda: args))
    serve_nothing(tmp_path, pools())
    assert "The KV cache stays off" in caplog.text
    assert word in caplog.text


def _one_layer(pool: list[torch.Tensor]) -> list[torch.Tensor]:
    return pool[:1]


def _narrow(pool: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor[:, :, :2].contiguous() for tensor in pool]


def _flat(pool: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.flatten(1) for tensor in pool]


@pytest.mark.parametrize(("k", "v"), [(_one_layer, _one_layer), (list, _narrow), (_narrow, _narrow), (_flat, _flat)])
def test_pools_that_are_not_the_models(
    k: Callable[..., Any], v: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    k_pool, v_pool = pools()
    serve_nothing(tmp_path, (k(k_pool), v(v_pool)))
    assert "The KV cache stays off" in caplog.text


def test_a_wrong_setting_is_said_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "many")
    with pytest.raises(ValueError, match="LMCACHE_CHUNK_SIZE"):
        LMCacheLayerwiseConnector(model_config(tmp_path), 1, 0, *pools())
