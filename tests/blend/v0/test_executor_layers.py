"""CacheBlendImpl, layer by layer."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from lmcache.blend.executor import CacheBlendImpl
from lmcache.observability import logging as our_logging
from tests.blend.v0.worlds import (
    DIM,
    HEADS,
    LAYERS,
    QUERY_HEADS,
    SHAPES,
    arguments,
    make_batch,
    run,
    shaped,
    shift_back,
    shift_forward,
    token_major,
)


def all_rows(batch):
    return torch.arange(batch.num_tokens)


def upto(executor, batch, layer, shape="heads", **overrides):
    """The output of ``layer``, after those before it."""
    rows = all_rows(batch)
    for each in range(layer + 1):
        output = executor.blend(**{**arguments(batch, each, rows, shape), **overrides})
        rows = output.local_indices
    return output


def with_deviations(batch, deviations):
    """The batch with V at layer 1 that deviates by these numbers in one place a token."""
    batch.retrieved_v[1] = batch.v[1]
    batch.retrieved_v[1, :, -1, -1] += torch.tensor(deviations, dtype=batch.v.dtype)
    return batch


# Layer 0


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_0_passes_everything_through(shape):
    batch = make_batch([3, 4])
    given = arguments(batch, 0, all_rows(batch), shape)
    output = CacheBlendImpl(0.5).blend(**given)
    assert output.q is given["fresh_q"]
    assert output.k is given["fresh_k"]
    assert output.v is given["fresh_v"]
    assert output.positions is given["positions"]
    assert output.query_start_loc is None
    assert output.local_indices.tolist() == list(range(7))
    assert output.local_indices.dtype == torch.int64
    assert output.local_indices.device.type == "cpu"


def test_layer_0_does_not_look_at_what_was_retrieved():
    batch = make_batch([3])
    overrides = {"retrieved_k": None, "retrieved_v": None}
    CacheBlendImpl(0.5).blend(**{**arguments(batch, 0, all_rows(batch)), **overrides})


# Layer 1: what is selected


def test_the_largest_deviations_of_v_are_selected():
    batch = with_deviations(make_batch([6]), [0, 3, -5, 1, 4, 0])
    assert upto(CacheBlendImpl(0.5), batch, 1).local_indices.tolist() == [1, 2, 4]


def test_only_v_counts():
    batch = with_deviations(make_batch([4]), [0, 0, 1, 0])
    batch.retrieved_k[1, 0] = 1000
    assert upto(CacheBlendImpl(0.25), batch, 1).local_indices.tolist() == [2]


def test_the_deviation_is_a_mean_of_squares_over_all_heads():
    batch = with_deviations(make_batch([2]), [0, 0])
    batch.retrieved_v[1, 0] += 1  # HEADS · DIM squares of 1
    batch.retrieved_v[1, 1, 0, 0] += 2
    batch.retrieved_v[1, 1, 1, 0] += 2  # 2 squares of 4: as much
    assert upto(CacheBlendImpl(0.5), batch, 1).local_indices.tolist() == [0]
    batch.retrieved_v[1, 1, 1, 0] += 1
    assert upto(CacheBlendImpl(0.5), batch, 1).local_indices.tolist() == [1]


def test_of_equal_deviations_the_first_tokens_are_selected():
    batch = with_deviations(make_batch([8]), [1, 2, 2, 0, 2, 2, 2, 1])
    assert upto(CacheBlendImpl(0.375), batch, 1).local_indices.tolist() == [1, 2, 4]


def test_deviations_are_measured_in_float32():
    batch = with_deviations(make_batch([3], dtype=torch.float16), [300, 400, 350])  # squares beyond float16
    assert upto(CacheBlendImpl(0.34), batch, 1).local_indices.tolist() == [1]


def test_nan_deviates_least():
    batch = with_deviations(make_batch([4]), [math.nan, 0, math.nan, 1])
    assert upto(CacheBlendImpl(0.5), batch, 1).local_indices.tolist() == [1, 3]


def test_tokens_that_were_not_found_are_selected_and_cost_no_budget():
    batch = with_deviations(make_batch([6], [1, 0, 1, 1, 0, 1]), [1, 9, 2, 3, 9, 0])
    assert upto(CacheBlendImpl(0.5), batch, 1).local_indices.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("found", "ratio", "budget"), [(10, 0.15, 1), (10, 0.19, 1), (10, 0.2, 2), (3, 0.3, 0), (0, 1.0, 0), (7, 1.0, 7)]
)
def test_the_budget_is_the_ratio_of_the_found_tokens_rounded_down(found, ratio, budget):
    batch = make_batch([12], [1] * found + [0] * (12 - found))
    assert len(upto(CacheBlendImpl(ratio), batch, 1).local_indices) == 12 - found + budget


def test_every_request_has_its_own_budget():
    batch = with_deviations(make_batch([4, 4, 2]), [9, 9, 9, 9, 1, 2, 3, 4, 0, 0])
    output = upto(CacheBlendImpl(0.5), batch, 1)
    assert output.local_indices.tolist() == [0, 1, 6, 7, 8]
    assert output.query_start_loc.tolist() == [0, 2, 4, 5]


def test_ratio_0_with_everything_found_selects_nothing():
    batch = make_batch([5, 3])
    output = upto(CacheBlendImpl(0.0), batch, 1)
    assert output.local_indices.tolist() == []
    assert output.q.shape == (0, QUERY_HEADS, DIM)
    assert output.positions.shape == (0,)
    assert output.query_start_loc.tolist() == [0, 0, 0]


def test_the_last_token_is_not_forced():
    batch = with_deviations(make_batch([4]), [5, 0, 0, 0])
    assert upto(CacheBlendImpl(0.25), batch, 1).local_indices.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8])
def test_masks_of_any_dtype(dtype):
    batch = make_batch([9], [1, 1, 0, 1, 0, 1, 1, 1, 0])
    expected = run(CacheBlendImpl(0.4), batch)
    got = run(CacheBlendImpl(0.4), batch, valid_mask=batch.valid.to(dtype))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.local_indices, other.local_indices)
        assert torch.equal(one.k, other.k)


# Layer 1: what is returned


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layer_1_returns_few_queries_and_all_fresh_keys_and_values(shape, dtype):
    batch = make_batch([5, 4], [1, 1, 0, 1, 1, 1, 1, 1, 0], dtype=dtype)
    executor = CacheBlendImpl(0.5)
    executor.blend(**arguments(batch, 0, all_rows(batch), shape))
    given = arguments(batch, 1, all_rows(batch), shape)
    output = executor.blend(**given)
    rows = output.local_indices
    assert len(rows) == (1 + 2) + (1 + 1)
    assert torch.equal(output.q, shaped(batch.q[1, rows], shape))
    assert torch.equal(output.positions, batch.positions[rows])
    assert output.k is given["fresh_k"]
    assert output.v is given["fresh_v"]
    assert rows.dtype == torch.int64
    assert rows.device.type == "cpu"
    assert rows.tolist() == sorted(set(rows.tolist()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_query_start_loc_counts_the_selected_tokens_in_the_callers_dtype(dtype):
    batch = make_batch([3, 2, 4, 1], [1, 0, 0, 1, 1, 0, 0, 0, 1, 0])
    output = upto(CacheBlendImpl(0.0), batch, 1, query_start_loc=batch.query_start_loc.to(dtype))
    assert output.query_start_loc.tolist() == [0, 2, 2, 5, 6]
    assert output.query_start_loc.dtype == dtype


def test_positions_are_the_callers_and_may_begin_anywhere():
    batch = make_batch([4], [0, 1, 0, 1])
    output = upto(CacheBlendImpl(0.0), batch, 1, positions=torch.tensor([70, 71, 72, 73], dtype=torch.int32))
    assert output.positions.tolist() == [70, 72]
    assert output.positions.dtype == torch.int32


# Above


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", range(2, LAYERS))
def test_above_layer_1_fresh_rows_lie_among_the_retrieved(shape, layer):
    batch = make_batch([5, 4], [1, 1, 0, 1, 1, 1, 1, 1, 0])
    executor = CacheBlendImpl(0.5)
    rows = upto(executor, batch, layer - 1, shape).local_indices
    given = arguments(batch, layer, rows, shape)
    output = executor.blend(**given)
    chosen = torch.zeros(9, 1, 1, dtype=torch.bool)
    chosen[rows] = True
    assert torch.equal(token_major(output.k, shape), batch.k[layer].where(chosen, batch.retrieved_k[layer]))
    assert torch.equal(token_major(output.v, shape), batch.v[layer].where(chosen, batch.retrieved_v[layer]))
    assert output.q is given["fresh_q"]
    assert output.positions is given["positions"]
    assert torch.equal(output.local_indices, rows)
    assert output.query_start_loc is None


def test_nothing_undefined_is_left():
    batch = make_batch([5, 4], [0, 1, 0, 1, 1, 1, 1, 1, 0])
    executor = CacheBlendImpl(0.2)
    executor.set_positional_encoder(shift_forward)
    executor.set_reverse_positional_encoder(shift_back)
    for output in run(executor, batch):
        assert not output.k.isnan().any()
        assert not output.v.isnan().any()


def test_with_nothing_selected_all_is_as_it_was_retrieved():
    batch = make_batch([5, 3])
    outputs = run(CacheBlendImpl(0.0), batch)
    for layer in range(2, LAYERS):
        assert torch.equal(outputs[layer].k, batch.retrieved_k[layer])
        assert torch.equal(outputs[layer].v, batch.retrieved_v[layer])


def test_with_everything_selected_all_is_fresh():
    batch = make_batch([5, 3])
    outputs = run(CacheBlendImpl(1.0), batch)
    for layer in range(LAYERS):
        assert torch.equal(outputs[layer].k, batch.k[layer])
        assert torch.equal(outputs[layer].v, batch.v[layer])
        assert outputs[layer].local_indices.tolist() == list(range(8))


@pytest.mark.parametrize("encoders", [False, True])
def test_the_callers_tensors_stay_as_they_are(encoders):
    batch = make_batch([6, 5], [1] * 4 + [0] + [1] * 6)
    executor = CacheBlendImpl(0.3)
    if encoders:
        executor.set_positional_encoder(lambda positions, q, k: (q, k.add_(positions.view(-1, 1, 1))))
        executor.set_reverse_positional_encoder(lambda positions, q, k: (q, k.sub_(positions.view(-1, 1, 1))))
    rows = all_rows(batch)
    for layer in range(LAYERS):
        given = arguments(batch, layer, rows)
        before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
        output = executor.blend(**given)
        for name, value in before.items():
            assert torch.equal(given[name].nan_to_num(99), value.nan_to_num(99)), name
        if layer > 1:
            output.k.zero_()
            output.v.zero_()
            assert torch.equal(given["retrieved_k"].nan_to_num(99), before["retrieved_k"].nan_to_num(99))
            assert torch.equal(given["retrieved_v"].nan_to_num(99), before["retrieved_v"].nan_to_num(99))
        rows = output.local_indices


def test_what_was_retrieved_may_be_of_another_dtype():
    batch = make_batch([6])
    executor = CacheBlendImpl(0.5)
    output = upto(executor, batch, 1)
    given = arguments(batch, 2, output.local_indices)
    given["retrieved_k"], given["retrieved_v"] = given["retrieved_k"].bfloat16(), given["retrieved_v"].bfloat16()
    output = executor.blend(**given)
    assert output.k.dtype == output.v.dtype == torch.float32


def test_a_negative_token_dim_counts_from_the_end():
    batch = make_batch([5, 4], [1, 1, 0, 1, 1, 1, 1, 1, 0])
    expected = run(CacheBlendImpl(0.5), batch, "heads first")
    got = run(CacheBlendImpl(0.5), batch, "heads first", token_dim=-2)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.q, other.q)
        assert torch.equal(one.k.nan_to_num(9), other.k.nan_to_num(9))


# Positional encoders


class Recorder:
    """An encoder that adds ``step`` to K and remembers how it was called."""

    def __init__(self, step, log):
        self.step, self.log = step, log

    def __call__(self, positions, q, k):
        self.log.append((self.step, positions.clone(), q.clone(), k.clone()))
        return None, k + self.step


@pytest.mark.parametrize("shape", SHAPES)
def test_how_the_encoders_are_called(shape):
    batch = make_batch([3, 4], [1, 1, 0, 1, 1, 1, 1])
    log = []
    executor = CacheBlendImpl(0.0)
    executor.set_positional_encoder(Recorder(10, log))
    executor.set_reverse_positional_encoder(Recorder(1, log))
    upto(executor, batch, 1, shape)
    assert log == [], "keys are moved above the check layer only"
    given = arguments(batch, 2, torch.tensor([2]), shape)
    output = executor.blend(**given)
    (first, old, q0, k0), (second, new, q1, k1) = log
    assert (first, second) == (1, 10), "the reverse encoder comes first"
    assert torch.equal(old, batch.original_positions.long())
    assert new.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert old.dtype == new.dtype == torch.int64
    assert torch.equal(k0.nan_to_num(9), given["retrieved_k"].nan_to_num(9))
    assert torch.equal(k1.nan_to_num(9), (k0 + 1).nan_to_num(9))
    for q in (q0, q1):
        assert q.shape == shaped(batch.q[2], shape).shape
        assert q.dtype == given["fresh_q"].dtype
        assert not q.any()
    moved = token_major(output.k, shape)
    kept = [0, 1, 3, 4, 5, 6]
    assert torch.equal(moved[kept], batch.retrieved_k[2, kept] + 11)
    assert torch.equal(moved[2], batch.k[2, 2]), "fresh keys are rotated already"
    assert torch.equal(token_major(output.v, shape)[kept], batch.retrieved_v[2, kept]), "values do not move"


def rotation(sign):
    """RoPE in the pairing of GPT-J, written with complex numbers; ``[N, H, D]``."""

    def rotate(positions, q, k):
        angles = positions[:, None, None].double() * 10000 ** (-torch.arange(DIM // 2) / (DIM // 2))
        turn = torch.polar(torch.ones_like(angles), sign * angles)

        def turned(x):
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

        return turned(q), turned(k)

    return rotate


def test_keys_end_up_rotated_to_where_they_are():
    batch = make_batch([40, 30])
    plain = torch.randn(70, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    _, batch.retrieved_k[2] = rotation(1)(batch.original_positions, plain, plain)
    executor = CacheBlendImpl(0.0)
    executor.set_positional_encoder(rotation(1))
    executor.set_reverse_positional_encoder(rotation(-1))
    output = upto(executor, batch, 2)
    _, expected = rotation(1)(batch.positions, plain, plain)
    torch.testing.assert_close(output.k, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoders", ["none", "forward", "reverse"])
def test_without_both_encoders_keys_stay_and_one_warning_comes(encoders, caplog, monkeypatch):
    monkeypatch.setattr(our_logging, "_last_said", {})
    batch = make_batch([5])
    for _ in range(2):
        executor = CacheBlendImpl(0.0)
        if encoders == "forward":
            executor.set_positional_encoder(shift_forward)
        if encoders == "reverse":
            executor.set_reverse_positional_encoder(shift_back)
        outputs = run(executor, batch)
        assert torch.equal(outputs[3].k, batch.retrieved_k[3])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "positional encoders" in record.getMessage()


def test_with_both_encoders_there_is_no_warning(caplog, monkeypatch):
    monkeypatch.setattr(our_logging, "_last_said", {})
    executor = CacheBlendImpl(0.0)
    executor.set_positional_encoder(shift_forward)
    executor.set_reverse_positional_encoder(shift_back)
    run(executor, make_batch([5]))
    assert caplog.records == []


# Several batches


def test_layer_0_begins_a_new_batch():
    executor = CacheBlendImpl(0.5)
    first, second = make_batch([8, 3], seed=1), make_batch([4], [1, 0, 1, 1], seed=2)
    for batch in (first, second, first):
        got, expected = run(executor, batch), run(CacheBlendImpl(0.5), batch)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one.local_indices, other.local_indices)
            assert torch.equal(one.k, other.k)


def test_a_batch_may_be_given_up_at_any_layer():
    executor, batch = CacheBlendImpl(0.5), make_batch([8])
    for layer in range(LAYERS):
        upto(executor, batch, layer)
    assert [len(output.q) for output in run(executor, make_batch([6]))] == [6, 3, 3, 3]


def test_no_tokens():
    for output in run(CacheBlendImpl(0.5), make_batch([0])):
        assert output.q.shape == (0, QUERY_HEADS, DIM)
        assert output.k.shape == (0, HEADS, DIM)
