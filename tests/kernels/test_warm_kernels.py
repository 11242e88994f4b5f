"""Kernels are compiled ahead, for every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcache.blend.correctors import make_corrector
from lmcache.blend.paged_blend import blend_pages
from lmcache.blend.policies import make_policy
from lmcache.blend.staged_layers import StagingRing
from lmcache.blend.warm_kernels import AttentionKind, warm_kernels
from tests.kernels.needs_triton import DEVICE, require

require()

from lmcache.blend.correctors import kriging_kernels  # noqa: E402 - needs Triton
from lmcache.kernels.launch import launch  # noqa: E402 - needs Triton
from tests.kernels.launching_modules import launching_modules  # noqa: E402 - needs Triton
from tests.kernels.test_blend_in_pages import ROPES, SIZES, Engine, FloatHost, two_prompts  # noqa: E402 - needs Triton


def test_every_kind_of_layer_is_run_without_a_model() -> None:
    engine = Engine("kv_second_nhd")
    layers = [
        AttentionKind(4, 0.25, *kind) for kind in ((), (9,), (None, 20.0), (None, None, torch.zeros(4, device=DEVICE)))
    ]
    ways = [
        (make_policy("sampled_attention"), make_corrector("kriging")),
        (make_policy("kv_deviation"), make_corrector("none")),
    ]
    before = engine.connector.tensors[0].clone()
    warm_kernels(engine.connector, ROPES, layers, StagingRing(DEVICE), ways)
    assert not torch.equal(engine.connector.tensors[0], before), "the pages were worked on"
    assert SIZES.layers == len(layers)


WAYS = [("sampled_attention", "kriging"), ("kv_deviation", "none")]


def test_no_kernel_of_a_blend_is_compiled_while_a_request_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one for prompts so long that few of their layers, or one, are corrected at once."""
    variants = _watch_variants(monkeypatch)
    engine, ring = Engine("kv_second_nhd"), StagingRing(DEVICE)
    ways = [(make_policy(policy), make_corrector(corrector)) for policy, corrector in WAYS]
    warm_kernels(engine.connector, ROPES, [AttentionKind(4, 0.25)] * SIZES.layers, ring, ways)
    warm = set(variants)
    assert len(warm) > 5
    ids, prompts = two_prompts(engine, 0.2)
    for layers in (1, 2, SIZES.layers):
        for name in ("_ROWS_AT_ONCE", "_ROWS_IN_PLACE"):
            monkeypatch.setattr(kriging_kernels, name, layers * len(ids[0]))
        for policy, corrector in ways:
            host = FloatHost(engine.model, ids[:1])
            blend_pages(host, engine.connector, prompts[:1], ROPES, policy, corrector, ring=ring)
    assert variants - warm == set()


def _watch_variants(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """By what Triton compiles for, as far as it hangs on the calls."""
    found: set[tuple[Any, ...]] = set()

    def watched(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        kinds = [arg.dtype if isinstance(arg, torch.Tensor) else arg is None for arg in args]
        found.add((kernel.fn.__name__, *kinds, *sorted(options.items())))
        launch(kernel, grid, *args, **options)

    for user in launching_modules():
        monkeypatch.setattr(user, "launch", watched)
    return found
