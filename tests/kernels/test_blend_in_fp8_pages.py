"""A blend in fp8 pages gives what the blend of the real numbers gives, rounded where pages round.

Two references blend in tensors of their own, in float32, what the pages and chunks stand for.

One rounds to fp8 whenever the pages do. Only what lies between two numbers of fp8 may come out as the other one then: a
few in a thousand, by a 16th to an 8th of themselves each.

The other never rounds. A number of e4m3 is off by 2.6 % of itself in the mean (by up to half a step, which is a 32nd to
a 16th of it), one of e5m2 by twice that. A key is rounded when it is moved and again when it is corrected, and layers
add their own to what they are given: four times the one rounding must do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lmcache.blend.blend_pass import BlendResult, blend
from lmcache.blend.correctors import make_corrector
from lmcache.blend.fp8_pages import Fp8Pages
from lmcache.blend.layer_kv import BatchKV, LayerKV
from lmcache.blend.paged_batch import can_blend_in_pages
from lmcache.blend.paged_blend import PagedPrompt, blend_pages
from lmcache.blend.policies import make_policy
from lmcache.blend.staged_layers import StagingRing
from lmcache.blend.warm_kernels import AttentionKind, warm_kernels
from tests.blend.core.tiny_model import LAYERS, TinyHost
from tests.kernels.fp8_numbers import real, rounded
from tests.kernels.needs_triton import DEVICE, require

require()

from tests.kernels.test_blend_in_pages import ROPES, SIZES, Engine, FloatHost, two_prompts  # noqa: E402 - needs Triton
from tests.kernels.test_layer_replay import Repeats, StillHost  # noqa: E402

SCALES = ((0.03, 0.011), (0.05, 0.02), (0.021, 0.017), (0.04, 0.03))
ROUNDING = {torch.float8_e4m3fn: 0.026, torch.float8_e5m2: 0.052}


def fp8_pages(dtype: torch.dtype = torch.float8_e4m3fn, scales: tuple[tuple[float, float], ...] = SCALES) -> Fp8Pages:
    return Fp8Pages(dtype, scales, torch.float32, DEVICE)


class Fp8Engine(Engine):
    """As vLLM, it calls its tensors bytes."""

    def __init__(self, layout: str, fp8: Fp8Pages) -> None:
        self.fp8 = fp8
        super().__init__(layout, replace(SIZES, dtype=torch.uint8))

    def kept(self, numbers: torch.Tensor, layer: int, plane: int) -> torch.Tensor:
        return rounded(numbers, self.fp8.dtype, self.fp8.scales[layer][plane]).view(torch.uint8)

    def pages(self, prompts: list[PagedPrompt]) -> list[list[torch.Tensor]]:
        """What the pages stand for: K and V of each layer."""
        every = self.connector.token_index(torch.cat([prompt.slots for prompt in prompts]))
        return [
            [
                real(plane.view(self.fp8.dtype), scale)
                for plane, scale in zip(self.connector.read_tokens(layer, every), self.fp8.scales[layer], strict=True)
            ]
            for layer in range(LAYERS)
        ]


class RealEngine(Engine):
    """The same numbers in float32."""

    def __init__(self, layout: str, like: Fp8Engine) -> None:
        self.fp8 = like.fp8
        super().__init__(layout)

    def kept(self, numbers: torch.Tensor, layer: int, plane: int) -> torch.Tensor:
        scale = self.fp8.scales[layer][plane]
        return real(rounded(numbers, self.fp8.dtype, scale), scale)


class HalfHost(FloatHost):
    """As an engine's model: in a half type, whatever the pages hold. Triton's interpreter cannot multiply bfloat16."""

    def given(self, x: torch.Tensor) -> torch.Tensor:
        return x.half()


class LikeHalfHost(FloatHost):
    """The same numbers in float32."""

    def given(self, x: torch.Tensor) -> torch.Tensor:
        return x.half().float()


class RoundedLayer(LayerKV):
    def __init__(self, layer: LayerKV, fp8: Fp8Pages) -> None:
        super().__init__(layer.layer_id, layer.keys, layer.values)
        self._fp8 = fp8
        self.round()

    def round(self) -> None:
        for plane, scale in zip((self.keys, self.values), self._fp8.scales[self.layer_id], strict=True):
            plane.copy_(real(rounded(plane, self._fp8.dtype, scale), scale))

    def write(self, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(rows, k, v)
        self.round()


class RoundedKV(BatchKV):
    def __init__(self, *args: Any, fp8: Fp8Pages) -> None:
        super().__init__(*args)
        self._fp8 = fp8

    def load(self, *args: Any) -> LayerKV:
        return RoundedLayer(super().load(*args), self._fp8)

    def correct_spans(self, layer: LayerKV, *args: Any) -> None:
        super().correct_spans(layer, *args)
        assert isinstance(layer, RoundedLayer)
        layer.round()


def blended(
    layout: str,
    fp8: Fp8Pages,
    used: Fp8Pages,
    recorder: Repeats | None = None,
    host_type: type[TinyHost] = FloatHost,
    **options: Any,
) -> tuple[Fp8Engine, list[PagedPrompt], BlendResult[Any]]:
    """By kernels, which go by ``used``."""
    torch.manual_seed(0)
    engine = Fp8Engine(layout, fp8)
    ids, prompts = two_prompts(engine, options.pop("ratio"))
    policy, corrector = make_policy(options.pop("policy")), make_corrector(options.pop("corrector"))
    assert can_blend_in_pages(engine.connector, ROPES, used)
    host = (host_type if recorder is None else StillHost)(engine.model, ids)
    ring = StagingRing(DEVICE)
    result = blend_pages(
        host, engine.connector, prompts, ROPES, policy, corrector, ring=ring, fp8=used, recorder=recorder, **options
    )
    return engine, prompts, result


def errors(layout: str, fp8: Fp8Pages, used: Fp8Pages, *, half: bool = False, **options: Any) -> tuple[float, float]:
    """How far the blend in pages is from the reference that rounds, and from the other: the worst layer's K or V.
    ``half``: the model computes in a half type."""
    engine, prompts, result = blended(layout, fp8, used, host_type=HalfHost if half else FloatHost, **options)
    policy, corrector = make_policy(options.pop("policy")), make_corrector(options.pop("corrector"))
    off = []
    for make_kv in (partial(RoundedKV, fp8=fp8), BatchKV):
        torch.manual_seed(0)
        reference = RealEngine(layout, engine)
        ids, same = two_prompts(reference, options["ratio"])
        expected = blend(
            (LikeHalfHost if half else FloatHost)(reference.model, ids),
            [prompt.planned(reference.connector) for prompt in same],
            ROPES,
            policy,
            corrector,
            max_rows=options.get("max_rows"),
            kv_only=True,
            make_kv=make_kv,
        )
        if make_kv is not BatchKV:
            assert (result.plans, result.charged_budgets) == (expected.plans, expected.charged_budgets)
        theirs = zip(expected.keys, expected.values, strict=True)
        pairs = [
            pair for planes in zip(engine.pages(prompts), theirs, strict=True) for pair in zip(*planes, strict=True)
        ]
        off.append(max(float((ours - exact).norm() / exact.norm()) for ours, exact in pairs))
    return off[0], off[1]


CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("kv_second_nhd", torch.float8_e4m3fn, {"policy": "sampled_attention", "corrector": "kriging", "ratio": 0.2}),
    ("kv_second_hnd", torch.float8_e5m2, {"policy": "sampled_attention", "corrector": "kriging", "ratio": 0.2}),
    ("kv_last_hnd", torch.float8_e4m3fn, {"policy": "kv_deviation", "corrector": "none", "ratio": 0.2}),
    (
        "kv_last_nhd",
        torch.float8_e4m3fn,
        {"policy": "query_attention", "corrector": "key_shift", "ratio": 0.2, "max_rows": 20},
    ),
]


@pytest.mark.parametrize(("layout", "dtype", "options"), CASES)
def test_fp8_pages_hold_what_a_blend_of_real_numbers_gives(
    layout: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    fp8 = fp8_pages(dtype)
    rounding, plain = errors(layout, fp8, fp8, **options)
    assert rounding < ROUNDING[dtype] / 4
    # A row may be rounded when it is stored, turned, and corrected twice, and where others look at it.
    assert plain < 5 * ROUNDING[dtype]


@pytest.mark.parametrize(
    ("policy", "corrector"),
    [("sampled_attention", "kriging"), ("sampled_attention", "key_shift"), ("query_attention", "kriging")],
)
def test_a_model_in_a_half_type_blends_in_fp8_pages(policy: str, corrector: str) -> None:
    """Rows that were computed early come back from the pages in float32, beside those that the model gives now."""
    fp8 = fp8_pages()
    rounding, plain = errors("kv_second_nhd", fp8, fp8, half=True, policy=policy, corrector=corrector, ratio=0.2)
    # The half type's own rounding puts more numbers on the other side of a step of fp8.
    assert rounding < ROUNDING[fp8.dtype] / 2
    assert plain < 5 * ROUNDING[fp8.dtype]


@pytest.mark.parametrize("plane", [0, 1])
def test_a_wrong_scale_is_noticed(plane: int) -> None:
    wrong = [list(scales) for scales in SCALES]
    wrong[1][plane] *= 1.1
    used = fp8_pages(scales=tuple((k, v) for k, v in wrong))
    rounding, _ = errors("kv_last_hnd", fp8_pages(), used, policy="none", corrector="none", ratio=0.0)
    assert rounding > ROUNDING[used.dtype]


def test_layers_of_other_scales_are_replayed_with_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def bytes_of(recorder: Repeats | None) -> torch.Tensor:
        how = {"policy": "sampled_attention", "corrector": "kriging", "ratio": 0.3}
        engine, _, _ = blended("kv_second_nhd", fp8_pages(), fp8_pages(), recorder, **how)
        return torch.stack(engine.connector.tensors)

    counts = Repeats()
    one_by_one = bytes_of(None)
    assert torch.equal(bytes_of(counts), one_by_one)
    assert counts.replayed > counts.recorded, "nothing was used twice"
    monkeypatch.setattr(Fp8Pages, "alike", True)
    assert not torch.equal(bytes_of(Repeats()), one_by_one), "the scales of the layer that was recorded"


def test_kernels_are_compiled_ahead() -> None:
    fp8 = fp8_pages()
    engine = Fp8Engine("kv_last_hnd", fp8)
    before = torch.stack(engine.connector.tensors)
    ways = [(make_policy("sampled_attention"), make_corrector("kriging"))]
    warm_kernels(engine.connector, ROPES, [AttentionKind(4, 0.25)] * LAYERS, StagingRing(DEVICE), ways, fp8)
    assert not torch.equal(torch.stack(engine.connector.tensors), before), "the pages were worked on"


def test_without_kernels_fp8_pages_are_refused() -> None:
    engine = Fp8Engine("kv_last_hnd", fp8_pages())
    ids, prompts = two_prompts(engine, 0.2)
    assert not can_blend_in_pages(engine.connector, ROPES), "bytes are no numbers"
    unlike = replace(fp8_pages(), dtype=torch.float8_e4m3fnuz)
    assert not can_blend_in_pages(engine.connector, ROPES, unlike)
    before = torch.stack(engine.connector.tensors)
    how = make_policy("none"), make_corrector("none")
    with pytest.raises(ValueError, match="by kernels alone"):
        blend_pages(FloatHost(engine.model, ids), engine.connector, prompts, ROPES, *how, fp8=engine.fp8)
    assert torch.equal(torch.stack(engine.connector.tensors), before)
