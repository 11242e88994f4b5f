from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.keys import (
    KEY_BYTES,
    Namespace,
    PrefixKey,
    SegmentKey,
    prefix_keys,
    segment_key,
    token_array,
    token_bytes,
)

NAMESPACE = Namespace(model="meta-llama/Llama-3.1-8B", kv_dtype="bfloat16", layout="token-major-1")
CHUNK = 4

TOKEN = st.integers(0, 2**32 - 1)
TOKENS = st.lists(TOKEN, max_size=40)
INT64_TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def keys(tokens, **kwargs) -> list[PrefixKey]:
    return prefix_keys(NAMESPACE, tokens, CHUNK, **kwargs)


# --- prefixes ---------------------------------------------------------------------------------------------------------


@given(TOKENS)
def test_a_key_for_each_whole_chunk(tokens):
    assert len(keys(tokens)) == len(tokens) // CHUNK
    assert len(keys(tokens, include_partial=True)) == -(-len(tokens) // CHUNK)


@given(TOKENS, TOKENS)
def test_keys_agree_exactly_as_far_as_the_tokens_do(left, right):
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    same = [a == b for a, b in zip(keys(left), keys(right), strict=False)]
    assert same == [(i + 1) * CHUNK <= common for i in range(len(same))]


@given(TOKENS, st.lists(TOKEN, max_size=40))
def test_what_follows_does_not_matter(tokens, more):
    assert keys(tokens + more)[: len(tokens) // CHUNK] == keys(tokens)


@given(TOKENS, st.integers(0, 10))
def test_going_on_from_a_parent_equals_hashing_the_whole(tokens, chunks):
    whole = keys(tokens, include_partial=True)
    cut = min(chunks, len(tokens) // CHUNK)
    parent = whole[cut - 1] if cut else None
    assert whole[:cut] + keys(tokens[cut * CHUNK :], parent=parent, include_partial=True) == whole


@given(st.lists(TOKEN, min_size=1, max_size=40))
def test_a_partial_chunk_is_not_the_whole_one(tokens):
    """Also not when the missing tokens are zeros: nothing is padded."""
    partial = keys(tokens, include_partial=True)
    padded = keys(tokens + [0] * (-len(tokens) % CHUNK))
    assert partial[:-1] == padded[:-1]
    assert (partial[-1] == padded[-1]) == (len(tokens) % CHUNK == 0)


def test_the_same_chunk_elsewhere_has_another_key():
    first, second = keys([1, 2, 3, 4, 1, 2, 3, 4])
    assert first != second


# --- input ------------------------------------------------------------------------------------------------------------


@given(INT64_TOKENS)
def test_every_kind_of_input_gives_the_same_keys(tokens):
    expected = keys(tokens, include_partial=True)
    inputs = [
        tuple(tokens),
        array("q", tokens),
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(tokens, dtype=torch.int32),
        np.array(tokens, dtype=np.int64),
        np.array(tokens, dtype=np.int32),
        np.array(tokens, dtype=np.uint32),
        np.array(tokens, dtype=">i8"),
        np.repeat(np.array(tokens, dtype=np.int64), 2)[::2],
    ]
    for value in inputs:
        assert keys(value, include_partial=True) == expected
        assert segment_key(NAMESPACE, value) == segment_key(NAMESPACE, tokens)


def test_the_largest_token():
    assert token_bytes([2**32 - 1]) == token_bytes(torch.tensor([2**32 - 1])) == b"\xff\xff\xff\xff"


@pytest.mark.parametrize("bad", [-1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_a_token_out_of_range_is_refused(kind, bad):
    with pytest.raises(ValueError, match="0 … 2³²−1"):
        keys(kind([1, 2, bad, 3]))
    with pytest.raises(ValueError, match="0 … 2³²−1"):
        segment_key(NAMESPACE, kind([1, 2, bad, 3]))


@pytest.mark.parametrize(
    "bad",
    [
        [1.0, 2.0, 3.0, 4.0],
        ["a", "b", "c", "d"],
        torch.ones(4),
        torch.ones(4, dtype=torch.bfloat16),
        torch.ones(4, 4, dtype=torch.int64),
        torch.ones(4, dtype=torch.bool),
        np.ones(4),
    ],
)
def test_what_is_no_row_of_integers_is_refused(bad):
    with pytest.raises(ValueError, match="integers"):
        keys(bad)


def test_a_chunk_has_a_token_at_least():
    with pytest.raises(ValueError, match="chunk_size=0"):
        prefix_keys(NAMESPACE, [1], 0)


def test_a_parent_of_another_namespace_is_refused():
    other = dataclasses.replace(NAMESPACE, lora="adapter")
    with pytest.raises(ValueError, match="not of the namespace"):
        prefix_keys(other, [1, 2, 3, 4], CHUNK, parent=keys([1, 2, 3, 4])[0])


# --- types ------------------------------------------------------------------------------------------------------------


@given(st.lists(TOKEN, max_size=CHUNK))
def test_a_prefix_is_never_a_segment(tokens):
    segment = segment_key(NAMESPACE, tokens)
    assert isinstance(segment, SegmentKey)
    for prefix in keys(tokens, include_partial=True):
        assert isinstance(prefix, PrefixKey)
        assert prefix != segment
        assert prefix.namespace_id == segment.namespace_id == NAMESPACE.id


@given(TOKENS, TOKENS)
def test_segments_agree_only_when_their_tokens_do(left, right):
    assert (segment_key(NAMESPACE, left) == segment_key(NAMESPACE, right)) == (left == right)


def test_a_key_is_its_bytes():
    (key,) = keys([1, 2, 3, 4])
    assert len(key) == KEY_BYTES
    assert PrefixKey(bytes(key)) == key
    assert hash(PrefixKey(bytes(key))) == hash(key)
    assert key.namespace_id + key.digest == key
    assert repr(key).startswith("PrefixKey(")
    with pytest.raises(ValueError, match="SegmentKey takes 48 bytes, got 3"):
        SegmentKey(b"abc")


# --- namespaces -------------------------------------------------------------------------------------------------------

FIELDS = [field.name for field in dataclasses.fields(Namespace)]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_every_key(field):
    value = getattr(NAMESPACE, field)
    other = dataclasses.replace(NAMESPACE, **{field: value + 1 if isinstance(value, int) else value + "x"})
    tokens = list(range(12))
    assert other.id != NAMESPACE.id
    assert not set(prefix_keys(other, tokens, CHUNK)) & set(keys(tokens))
    assert segment_key(other, tokens) != segment_key(NAMESPACE, tokens)


TEXT = st.text(alphabet=st.characters(codec=None, categories=("L", "P", "Cc", "Cs", "So")), max_size=4)
NAMESPACES = st.builds(
    Namespace,
    model=TEXT,
    kv_dtype=TEXT,
    layout=TEXT,
    revision=TEXT,
    model_config=TEXT,
    tp_rank=st.integers(0, 12),
    tp_size=st.integers(1, 12),
    pp_rank=st.integers(0, 12),
    pp_size=st.integers(1, 12),
    lora=TEXT,
    cache_salt=TEXT,
)


@given(NAMESPACES, NAMESPACES)
def test_namespaces_agree_only_when_every_field_does(left, right):
    assert (left.id == right.id) == (left == right)


@given(TEXT, TEXT)
def test_text_does_not_wander_from_one_field_to_the_next(left, right):
    one = dataclasses.replace(NAMESPACE, lora=left + right, cache_salt="")
    two = dataclasses.replace(NAMESPACE, lora=left, cache_salt=right)
    assert (one.id == two.id) == (one == two)


def test_half_a_surrogate_pair_in_a_salt_is_a_salt_like_any_other():
    """JSON allows it, so a client can send it; two halves are not the character they would make."""
    halves = dataclasses.replace(NAMESPACE, cache_salt="\ud83d\ude00")
    whole = dataclasses.replace(NAMESPACE, cache_salt="\U0001f600")
    assert halves.id != whole.id


def test_shards_differ_in_their_keys_but_not_in_their_digests():
    """So a prompt is hashed once for all of them."""
    whole = dataclasses.replace(NAMESPACE, lora="a", cache_salt="s")
    shards = [
        whole,
        *(dataclasses.replace(whole, tp_rank=rank, tp_size=2) for rank in range(2)),
        *(dataclasses.replace(whole, pp_rank=rank, pp_size=2) for rank in range(2)),
    ]
    tokens = list(range(10))
    keys = [prefix_keys(shard, tokens, 4) for shard in shards]
    assert len({key for chain in keys for key in chain}) == len(shards) * 2
    assert len({tuple(key.digest for key in chain) for chain in keys}) == 1
    assert [key.of_shard(shards[2]) for key in keys[0]] == keys[2]
    assert len({segment_key(shard, tokens) for shard in shards}) == len(shards)
    assert segment_key(whole, tokens).of_shard(shards[1]) == segment_key(shards[1], tokens)
    for one in shards:
        for other in shards:
            assert segment_key(one, tokens).moved(one.shard, other.shard) == segment_key(other, tokens)


def test_more_ranks_than_keys_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match="a size is 1 … 256"):
        _ = dataclasses.replace(NAMESPACE, tp_rank=0, tp_size=257).id


# --- processes --------------------------------------------------------------------------------------------------------

IN_ANOTHER_PROCESS = """
from lmcache.keys import Namespace, prefix_keys, segment_key
namespace = Namespace(
    model="m", kv_dtype="bfloat16", layout="token-major-1", lora="a", cache_salt="s", tp_rank=1, tp_size=2
)
tokens = list(range(10))
for key in [*prefix_keys(namespace, tokens, 4, include_partial=True), segment_key(namespace, tokens)]:
    print(key.hex())
"""


def test_keys_do_not_depend_on_the_process():
    """Servers that were started with different hash seeds once shared a store and never found each other's entries."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert outputs.pop().split()[0] == GOLDEN_FIRST_KEY


GOLDEN_FIRST_KEY = "78e65ae8ea91a03c3e8c070dd5e4246241430dfcfb663f138cbd65b35d79d14613cf4e22bd3cbafe642598f13537084b"
"""Changing it makes every disk directory and shared store worthless: bump the layout version instead, on purpose."""


def test_an_array_of_tokens_is_its_own_only_where_nobody_can_change_it() -> None:
    """What is kept of it (a row for the catalog, say) must not change with the caller's."""
    callers = np.array([1, 2, 3], np.uint32)
    ours = token_array(callers)
    assert not np.shares_memory(ours, callers)
    assert np.shares_memory(token_array(ours), ours)
    callers[0] = 9
    assert ours.tolist() == [1, 2, 3]
