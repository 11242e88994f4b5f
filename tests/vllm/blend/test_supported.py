"""What is read from vLLM's modules and configuration, on stand-ins for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="the host imports vLLM")

from vllm.model_executor.layers.mamba.abstract import MambaBase

from lmcache.blend.rope import FusedRope, RopeFrequencies
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.blend.trial import ropes_in_use
from lmcache.integration.vllm.blend.blender import Blender
from lmcache.integration.vllm.blend.scoring import Scoring
from lmcache.integration.vllm.blend.supported import attention_layers, check_served
from lmcache.integration.vllm.worker_side import WorkerSide
from lmcache.observability.metrics import Metrics

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("said", "window"),
    [(None, None), (-1, None), (0, None), (128, 128), ((-1, -1), None), ((127, 0), 128), ((0, 0), 1), ([127, 0], 128)],
)
def test_sliding_windows_of_the_backends(said: Any, window: int | None) -> None:
    assert Scoring.of(SimpleNamespace(scale=1, sliding_window=said)).sliding_window == window


def test_scoring_of_a_backend() -> None:
    sinks = torch.zeros(4)
    plain = Scoring.of(SimpleNamespace(scale=0.5, sliding_window=None, logits_soft_cap=0))
    assert plain == Scoring(0.5, None, None, None)
    capped = Scoring.of(SimpleNamespace(scale=0.5, sliding_window=None, logits_soft_cap=30.0, sinks=sinks))
    assert (capped.softcap, capped.sinks) == (30.0, sinks)


def served(**parallel: Any) -> Any:
    sizes = dict.fromkeys(
        ("tensor", "pipeline", "data", "decode_context", "prefill_context"),
        1,
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(is_encoder_decoder=False),
        lora_config=None,
        parallel_config=SimpleNamespace(
            **{f"{kind}_parallel_size": size for kind, size in {**sizes, **parallel}.items() if kind != "is_moe_model"},
            is_moe_model=parallel.get("is_moe_model", True),
        ),
    )


@pytest.mark.parametrize("kind", ["pipeline", "data", "decode_context", "prefill_context"])
def test_ranks_that_must_act_together_are_refused(kind: str) -> None:
    check_served(nn.Identity(), served())
    with pytest.raises(UnsupportedModelError, match=r"Identity cannot be blended: .* rank"):
        check_served(nn.Identity(), served(**{kind: 2}))


def test_tensor_parallel_ranks_agree() -> None:
    check_served(nn.Identity(), served(tensor=2))


def test_data_parallel_ranks_of_a_dense_model_are_alone() -> None:
    check_served(nn.Identity(), served(data=2, is_moe_model=False))


class Recurrent(nn.Module, MambaBase):
    """A layer of a hybrid model."""

    def forward(self) -> None: ...

    get_state_shape = get_state_dtype = get_attn_backend = mamba_type = None  # type: ignore[assignment]


def test_hybrid_models_are_refused() -> None:
    model = nn.Sequential(Recurrent())
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"layers.0": model[0]}))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 is of type Recurrent"):
        attention_layers(model, config)


def test_layers_of_other_models_are_not_looked_at() -> None:
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"draft.0": Recurrent()}))
    with pytest.raises(UnsupportedModelError, match="no attention layers"):
        attention_layers(nn.Identity(), config)


ROPE = FusedRope(RopeFrequencies(torch.tensor([1.0, 0.1])), head_size=4)


class OneLayer:
    """An :class:`EngineModel`: one layer, whose K and V ``make`` makes of ids and positions."""

    def __init__(self, make: Any) -> None:
        self.model = nn.Identity()
        self.layers = {"layers.0": None}
        self.vocab_size, self.max_positions = 50, 512
        self._make = make

    def run(self, ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> None:
        token = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(1))[ids]
        k, v = self._make(token, positions)
        attend(0, k, k, v, scale=1.0)


def turned(token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return ROPE.fused_encode(torch.zeros_like(positions), positions, token.clone())


def test_trial_of_keys_that_turn() -> None:
    assert ropes_in_use(OneLayer(lambda x, at: (turned(x, at), x)), [ROPE]) == [ROPE]  # type: ignore[arg-type]


@pytest.mark.parametrize("rope", [ROPE, None])
def test_trial_of_keys_that_stay(rope: FusedRope | None) -> None:
    assert ropes_in_use(OneLayer(lambda x, at: (x, x)), [rope]) == [None]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x, at: (turned(x, 2 * at), x), "keys of layer 0 at other positions"),
        (lambda x, at: (turned(x, at), x + at[:, None, None]), "values of layer 0 depend on their position"),
        (lambda x, at: (turned(x, at), x + x.roll(1, 0)), "values of layer 0 .* neighbours"),
        (lambda x, at: (turned(x, at), x * torch.nan), "values of layer 0"),
        (lambda x, at: 1 / 0, "does not run by itself: ZeroDivisionError"),
    ],
)
def test_trial_of_models_that_do_not_fit(make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        ropes_in_use(OneLayer(make), [ROPE])  # type: ignore[arg-type]


def test_trial_of_layers_that_run_in_another_order() -> None:
    model = OneLayer(lambda x, at: (turned(x, at), x))
    model.layers["layers.1"] = None
    with pytest.raises(UnsupportedModelError, match=r"in the order \[0\], not \[0, 1\]"):
        ropes_in_use(model, [ROPE, ROPE])  # type: ignore[arg-type]


@pytest.mark.parametrize("compiles", [True, False])
def test_nothing_is_blended_where_the_kernels_cannot_be_compiled(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found:
        def warm_up(self, *_: Any, **__: Any) -> None:
            if not compiles:
                raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(Blender, "find", lambda *_: Found())
    config = LMCacheEngineConfig.from_defaults(enable_blending=True)
    side: Any = object.__new__(WorkerSide)
    side._shared = SimpleNamespace(blender=None, config=config, metrics=Metrics())
    side._vllm_config = None
    side._find_blender(None, [])
    assert (side._shared.blender is not None) == compiles


def test_a_configuration_that_cannot_be_used_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(_: object) -> None:
        raise ValueError("blend_policy='nonsense'")

    monkeypatch.setattr("lmcache.integration.vllm.worker_side.BlendDefaults", refuses)
    metrics = Metrics()
    side: Any = object.__new__(WorkerSide)
    side._shared = SimpleNamespace(blender=None, config=None, metrics=metrics)
    side._find_blender(None, [])
    assert side._shared.blender is None
    assert any("configuration" in name for name, value in metrics.snapshot().items() if value)
