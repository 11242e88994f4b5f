"""What is read from layers of vLLM that keep their KV as fp8, on stand-ins for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="the host imports vLLM")

from lmcache.blend.fp8_pages import Fp8Pages
from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.vllm.blend import fp8_layers
from lmcache.integration.vllm.blend.blender import Blender
from lmcache.integration.vllm.blend.fp8_layers import fp8_pages, reason_against
from lmcache.integration.vllm.blend.host import _StandIn
from lmcache.paging.token_connector import TokenConnector
from tests.kernels.fp8_numbers import rounded
from tests.paging.worlds import WORLDS, Sizes

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")


def layer(kept: str = "fp8", key_scale: float = 0.03, value_scale: float = 0.5, **said: Any) -> Any:
    return SimpleNamespace(
        dtype=torch.bfloat16,
        kv_cache_torch_dtype=torch.uint8,
        kv_cache_dtype=kept,
        _q_scale=torch.tensor(0.25),
        _k_scale=torch.tensor(key_scale),
        _v_scale=torch.tensor(value_scale),
        _k_scale_float=key_scale,
        _v_scale_float=value_scale,
        **said,
    )


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_layers, "current_platform", SimpleNamespace(is_cuda=lambda: True))


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("kept", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_fp8_with_a_scale_a_layer_is_known(kept: str) -> None:
    assert reason_against(layer(kept)) is None
    assert reason_against(layer(kept, calculate_kv_scales=False)) is None


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (layer("fp8_per_token_head"), "keeps its KV as fp8_per_token_head"),
        (layer("nvfp4"), "keeps its KV as nvfp4"),
        (layer(calculate_kv_scales=True), "takes from the first prompt"),
        (SimpleNamespace(**{**vars(layer()), "_k_scale": torch.ones(8)}), "each head by scales of its own"),
        (SimpleNamespace(**{**vars(layer()), "_q_scale": torch.ones(8)}), "each head by scales of its own"),
    ],
)
def test_other_small_numbers_are_refused(said: Any, reason: str) -> None:
    assert reason in str(reason_against(said))


def test_fp8_is_refused_without_a_gpu() -> None:
    assert reason_against(layer()) == (
        "computes in torch.bfloat16 and keeps its KV as fp8, which is blended on NVIDIA GPUs only"
    )


class Writer:
    """Writes as vLLM does, numbers of ``dtype`` by ``scales``."""

    available = True

    def __init__(self, connector: TokenConnector, dtype: torch.dtype, scales: tuple[tuple[float, float], ...]) -> None:
        self._connector = connector
        self._dtype = dtype
        self._scales = scales

    def __call__(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        planes = [
            rounded(x, self._dtype, by).view(torch.uint8) for x, by in zip((k, v), self._scales[layer], strict=True)
        ]
        self._connector.write_tokens(layer, self._connector.token_index(slots), planes)


SCALES = ((0.03, 0.5), (0.011, 1.0), (1.0, 0.7))
LAYERS = [layer("fp8_e5m2", *scales) for scales in SCALES]


def connector() -> TokenConnector:
    world = WORLDS["kv_last_hnd"](Sizes(dtype=torch.uint8))
    return TokenConnector(world.layout, world.tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_vllm_writes_tells_which_fp8_it_is(dtype: torch.dtype) -> None:
    pages = connector()
    before = torch.stack(pages.tensors)
    found = fp8_pages(nn.Identity(), LAYERS, pages, Writer(pages, dtype, SCALES))  # type: ignore[arg-type]
    assert found == Fp8Pages(dtype, SCALES, torch.bfloat16, CPU)
    assert torch.equal(torch.stack(pages.tensors), before), "the slot has what it held"


def test_other_scales_than_vllm_goes_by_are_noticed() -> None:
    pages = connector()
    writer = Writer(pages, torch.float8_e4m3fn, ((0.03, 0.5), (0.011, 1.0), (1.0, 0.8)))
    with pytest.raises(UnsupportedModelError, match="do not hold KV divided by their scales"):
        fp8_pages(nn.Identity(), LAYERS, pages, writer)  # type: ignore[arg-type]


def test_where_nothing_can_be_written_the_name_tells() -> None:
    unable: Any = SimpleNamespace(available=False)
    for kept, dtype in (("fp8_e5m2", torch.float8_e5m2), ("fp8", torch.float8_e4m3fn)):
        found = fp8_pages(nn.Identity(), [layer(kept)], connector(), unable)
        assert found is not None
        assert found.dtype == dtype


def test_real_numbers_have_no_scales() -> None:
    plain = SimpleNamespace(dtype=torch.bfloat16, kv_cache_torch_dtype=torch.bfloat16)
    assert fp8_pages(nn.Identity(), [plain], connector(), SimpleNamespace()) is None  # type: ignore[arg-type]


def test_without_kernels_the_model_is_refused() -> None:
    pages = connector()
    model: Any = SimpleNamespace(model=nn.Identity(), layers={})
    with pytest.raises(UnsupportedModelError, match="kernels alone can blend"):
        Blender(model, [None] * 3, pages, 16, Fp8Pages(torch.float8_e4m3fn, SCALES, torch.bfloat16, CPU))


def test_scales_that_come_with_other_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.integration.vllm.blend.blender.can_blend_in_pages", lambda *_: True)
    layers = {str(number): layer(key_scale=scales[0], value_scale=scales[1]) for number, scales in enumerate(SCALES)}
    model: Any = SimpleNamespace(model=nn.Identity(), layers=layers)
    pages = Fp8Pages(torch.float8_e4m3fn, SCALES, torch.bfloat16, CPU)
    blender = Blender(model, [None] * 3, connector(), 16, pages)
    assert blender._pages_now() is pages
    layers["1"]._k_scale_float = 0.5
    now = blender._pages_now()
    assert now is not None
    assert now.scales == (SCALES[0], (0.5, 1.0), SCALES[2])
    assert now.table[1, :, 0].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_queries_that_vllm_has_rounded_are_real_again(shape: tuple[int, ...]) -> None:
    seen: list[torch.Tensor] = []

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **scoring: Any) -> torch.Tensor:
        seen.append(q)
        return q

    of_layer = layer(impl=SimpleNamespace(scale=1.0), kv_cache=None)
    of_layer._q_scale = torch.full(shape, 0.25)
    query, key = (torch.randn(3, 2, 8).bfloat16() for _ in range(2))
    stand_in = _StandIn(0, of_layer, attend)
    stand_in.forward(None, query, key, key, None, None, torch.empty_like(query))
    assert torch.equal(seen.pop(), query)
    stored = rounded(query, torch.float8_e4m3fn, 0.25)
    output = torch.empty_like(query)
    stand_in.forward(None, stored, key, key, None, None, output)
    assert torch.equal(output, (stored.float() * 0.25).bfloat16())
    assert seen[0].dtype == torch.bfloat16
