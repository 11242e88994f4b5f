"""Which connector is chosen; on a GPU, which is not here, it must be the one that stages whole chunks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache.paging import make_connector as module
from lmcache.paging.layout import KVLayout, Page, Plane
from lmcache.paging.make_connector import make_connector

PLANE = Plane(0, (2 * 16 * 2 * 8, 2 * 8, 8, 1))
LAYOUT = KVLayout(
    "k-then-v", torch.bfloat16, 3, 6, 16, 2, 8, (PLANE, replace(PLANE, offset=16 * 2 * 8)), Page(512, 512)
)


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BlockConnector", "StagedConnector", "TokenConnector"):
        monkeypatch.setattr(module, name, lambda layout, tensors, name=name, **how: name)


def chosen(
    monkeypatch: pytest.MonkeyPatch, device: str, layout: KVLayout = LAYOUT, *, kernels: bool, **how: Any
) -> Any:
    monkeypatch.setattr(module, "kernels_for", lambda device: kernels)
    return make_connector(layout, [SimpleNamespace(device=torch.device(device))] * 3, 256, **how)  # type: ignore[list-item]


def test_on_a_gpu_chunks_are_staged_and_kernels_move_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "cuda", kernels=True) == "StagedConnector"
    assert chosen(monkeypatch, "cuda", kernels=True, token_major=True) == "StagedConnector"


def test_on_a_gpu_without_kernels_torch_moves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "cuda", kernels=False) == "TokenConnector"


def test_heads_whose_numbers_do_not_lie_together_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = replace(LAYOUT, planes=tuple(replace(plane, strides=(512, 16, 1, 2)) for plane in LAYOUT.planes))
    assert chosen(monkeypatch, "cuda", apart, kernels=True) == "TokenConnector"


def test_other_devices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "xpu", kernels=True) == "TokenConnector"


def test_in_host_memory_whole_pages_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "cpu", kernels=True) == "BlockConnector"
    assert chosen(monkeypatch, "cpu", kernels=True, token_major=True) == "TokenConnector"


def test_packed_pages_cannot_be_moved_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = replace(LAYOUT, planes=(), packing="tiles")
    with pytest.raises(ValueError, match="pages are on cuda"):
        chosen(monkeypatch, "cuda", packed, kernels=True)
