"""CacheBlendImpl against an implementation that does everything one token at a time, in Python numbers."""

from __future__ import annotations

from itertools import chain

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from lmcache.blend.executor import CacheBlendImpl
from tests.blend.v0.worlds import LAYERS, SHAPES, make_batch, run, shift_back, shift_forward, token_major


def reference_selection(batch, ratio):
    selected = []
    for request in batch.requests:
        found = [token for token in request if batch.valid[token] != 0]
        deviation = {}
        for token in found:
            pairs = zip(
                batch.v[1, token].flatten().tolist(), batch.retrieved_v[1, token].flatten().tolist(), strict=True
            )
            deviation[token] = sum((fresh - retrieved) ** 2 for fresh, retrieved in pairs)
        worst_first = sorted(found, key=lambda token: (-deviation[token], token))
        missing = [token for token in request if batch.valid[token] == 0]
        selected.append(sorted(missing + worst_first[: int(len(found) * ratio)]))
    return selected


def reference_kv(batch, layer, selected):
    """K and V of every token as nested lists."""
    keys, values = [], []
    for request in batch.requests:
        for place, token in enumerate(request):
            fresh = layer < 2 or token in selected
            move = 0 if fresh else place - int(batch.original_positions[token])
            k = batch.k if fresh else batch.retrieved_k
            v = batch.v if fresh else batch.retrieved_v
            keys.append([[number + move for number in head] for head in k[layer, token].tolist()])
            values.append(v[layer, token].tolist())
    return keys, values


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    valid = draw(st.lists(st.sampled_from([0, 1]), min_size=sum(lengths), max_size=sum(lengths)))
    return make_batch(lengths, valid, seed=draw(st.integers(0, 1000)), dtype=draw(st.sampled_from(DTYPES)))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ratios = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.15, 0.5, 1.0]))


@settings(max_examples=150)
@given(batches(), ratios, st.sampled_from(list(SHAPES)))
def test_like_the_reference(batch, ratio, shape):
    executor = CacheBlendImpl(ratio)

    def in_token_major(encode):
        def encoder(positions, q, k):
            _, moved = encode(positions, token_major(q, shape), token_major(k, shape))
            return q, moved.flatten(1) if shape == "flat" else moved.transpose(0, 1) if SHAPES[shape] else moved

        return encoder

    executor.set_positional_encoder(in_token_major(shift_forward))
    executor.set_reverse_positional_encoder(in_token_major(shift_back))
    per_request = reference_selection(batch, ratio)
    selected = list(chain.from_iterable(per_request))
    outputs = run(executor, batch, shape)
    starts = [sum(map(len, per_request[:i])) for i in range(len(per_request) + 1)]
    assert [output.query_start_loc is None for output in outputs] == [layer != 1 for layer in range(LAYERS)]
    assert outputs[1].query_start_loc.tolist() == starts
    for layer, output in enumerate(outputs):
        rows = selected if layer else list(range(batch.num_tokens))
        assert output.local_indices.tolist() == rows
        assert output.positions.tolist() == batch.positions[rows].tolist()
        assert torch.equal(token_major(output.q, shape), batch.q[layer, rows])
        keys, values = reference_kv(batch, layer, selected)
        assert token_major(output.k, shape).tolist() == keys
        assert token_major(output.v, shape).tolist() == values
