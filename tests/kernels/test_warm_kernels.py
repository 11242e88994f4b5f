"""Kernels are compiled ahead, for every kind of layer."""

from __future__ import annotations

import torch

from lmcache.blend.correctors import make_corrector
from lmcache.blend.policies import make_policy
from lmcache.blend.staged_layers import StagingRing
from lmcache.blend.warm_kernels import AttentionKind, warm_kernels
from tests.kernels.needs_triton import DEVICE, require

require()

from tests.kernels.test_blend_in_pages import ROPES, SIZES, Engine  # noqa: E402 - needs Triton


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
