"""What a caller of CacheBlendImpl can get wrong: each is a ValueError that names the values."""

from __future__ import annotations

import math

import pytest
import torch

from lmcache.blend.executor import CacheBlendImpl
from lmcache.blend.interfaces import BlendExecutor
from tests.blend.v0.worlds import LAYERS, arguments, make_batch, run, shift_back


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, math.inf])
def test_ratios_out_of_range(ratio):
    with pytest.raises(ValueError, match=f"recompute_ratio={ratio}"):
        CacheBlendImpl(ratio)


BATCH = make_batch([5, 4], [1, 1, 0, 1, 1, 1, 1, 1, 0])
ALL = torch.arange(9)


def at_layer(layer):
    """An executor that has seen the layers below, and good arguments for this one."""
    executor, rows = CacheBlendImpl(0.5), ALL
    for below in range(layer):
        rows = executor.blend(**arguments(BATCH, below, rows)).local_indices
    return executor, arguments(BATCH, layer, rows)


@pytest.mark.parametrize(
    ("seen", "layer", "named"),
    [
        ([], 2, "layer_id=2 came first"),
        ([], -1, "layer_id=-1 came first"),
        ([0], 2, "layer_id=2 came after layer 0"),
        ([0], 3, "layer_id=3 came after layer 0"),
        ([0, 1], 1, "layer_id=1 came after layer 1"),
        ([0, 1, 2, 3], 2, "layer_id=2 came after layer 3"),
        ([0, 1, 2, 3], 1, "layer_id=1 came after layer 3"),
        ([0, 1, 2, 0], 2, "layer_id=2 came after layer 0"),
    ],
)
def test_layers_out_of_order(seen, layer, named):
    executor, rows = CacheBlendImpl(0.5), ALL
    for each in seen:
        rows = executor.blend(**arguments(BATCH, each, ALL if each == 0 else rows)).local_indices
    with pytest.raises(ValueError, match=named):
        executor.blend(**{**arguments(BATCH, 2, rows), "layer_id": layer})


WRONG = [
    ([0, 1, 2], "fresh_k", torch.zeros(3, 2, 4), r"fresh_k has 3 tokens"),
    ([0, 1, 2], "fresh_v", torch.zeros(3, 2, 4), r"fresh_v has 3 tokens"),
    ([2], "fresh_q", torch.zeros(9, 3, 4), r"fresh_q has 9 tokens: expected 5"),
    ([2], "fresh_k", torch.zeros(9, 2, 4), r"fresh_k has 9 tokens: expected 5"),
    ([0, 1, 2], "fresh_v", torch.zeros(9), r"fresh_v: .*token_dim=0.*\[9\]"),
    ([0, 1, 2], "positions", torch.arange(4), r"positions: expected \[\d\], got \[4\]"),
    ([0, 1, 2], "positions", torch.zeros(9, 1), r"positions: expected \[\d\], got \[9, 1\]"),
    ([1, 2], "retrieved_k", torch.zeros(8, 2, 4), r"retrieved_k: expected \[9, 2, 4\].*got \[8, 2, 4\]"),
    ([1, 2], "retrieved_v", torch.zeros(9, 8), r"retrieved_v: expected \[9, 2, 4\].*got \[9, 8\]"),
    ([1, 2], "retrieved_v", torch.zeros(9, 1, 4), r"retrieved_v: expected \[9, 2, 4\].*got \[9, 1, 4\]"),
    ([1, 2], "retrieved_k", None, "retrieved_k is None: nothing was found"),
    ([1, 2], "retrieved_v", None, "retrieved_v is None: nothing was found"),
    ([1, 2], "valid_mask", torch.ones(8), r"valid_mask: expected \[9\], got \[8\]"),
    ([1, 2], "original_positions", torch.ones(10), r"original_positions: expected \[9\], got \[10\]"),
    ([0, 1, 2], "query_start_loc", torch.tensor([0, 5, 8]), r"query_start_loc=\[0, 5, 8\].*9"),
    ([0, 1, 2], "query_start_loc", torch.tensor([0, 10, 9]), r"query_start_loc=\[0, 10, 9\].*9"),
    ([1, 2], "query_start_loc", torch.tensor([0, 4, 9]), r"\(0, 4\).*\(0, 5\).*whole batch"),
    ([2], "query_start_loc", torch.tensor([0, 3, 6]), r"query_start_loc=\[0, 3, 6\].*9"),
    ([0, 1, 2], "token_dim", 3, r"token_dim=3.*\[\d, 3, 4\]"),
    ([0, 1, 2], "token_dim", -4, r"token_dim=-4"),
]


@pytest.mark.parametrize(
    ("layer", "name", "value", "named"),
    [(layer, *rest) for layers, *rest in WRONG for layer in layers],
    ids=[f"layer {layer}: {name} {i}" for i, (layers, name, *_) in enumerate(WRONG) for layer in layers],
)
def test_arguments_that_do_not_fit(layer, name, value, named):
    executor, good = at_layer(layer)
    with pytest.raises(ValueError, match=named):
        executor.blend(**{**good, name: value})
    executor.blend(**good)  # a call that failed has changed nothing


def test_encoders_that_change_the_shape():
    executor, good = at_layer(2)
    executor.set_reverse_positional_encoder(shift_back)
    executor.set_positional_encoder(lambda positions, q, k: (q, k[:1]))
    with pytest.raises(ValueError, match=r"\[9, 2, 4\] into \[1, 2, 4\]"):
        executor.blend(**good)


def test_layers_may_be_left_out_above_the_check_layer():
    executor, good = at_layer(2)
    executor.blend(**{**good, "layer_id": LAYERS + 3})


def test_the_check_layer_may_be_the_first():
    executor = CacheBlendImpl(0.5)
    output = executor.blend(**arguments(BATCH, 1, ALL))
    assert torch.equal(output.local_indices, run(CacheBlendImpl(0.5), BATCH)[1].local_indices)


def test_executors_must_say_how_they_blend():
    with pytest.raises(TypeError, match="blend"):
        BlendExecutor()
