"""KV that comes and goes as tensors."""

from __future__ import annotations

import pytest
import torch

from tests.engine.helpers import (
    CHUNK,
    DIM,
    HEADS,
    LAYERS,
    PagesConnector,
    kv_of,
    leading,
    make_metadata,
    per_layer,
    tokens_of,
)


@pytest.fixture
def engine(make_engine):
    engine = make_engine()
    yield engine
    engine.close()


def assert_layers(got, expected):
    assert len(got) == len(expected)
    for got_layer, expected_layer in zip(got, expected, strict=True):
        assert len(got_layer) == len(expected_layer)
        for got_plane, expected_plane in zip(got_layer, expected_layer, strict=True):
            assert torch.equal(got_plane, expected_plane)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("stored_as", ["blob", "layers"])
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_what_was_stored_comes_back(dtype, stored_as, kind, make_engine):
    metadata = make_metadata(kv_dtype=dtype)
    engine = make_engine(metadata=metadata)
    tokens = tokens_of(4 * CHUNK)
    blob = kv_of(tokens, metadata)
    assert engine.store(kind(tokens), blob if stored_as == "blob" else per_layer(blob)) == 4 * CHUNK
    assert engine.lookup(kind(tokens)) == 4 * CHUNK
    kv, found = engine.retrieve(kind(tokens))
    assert_layers(kv, per_layer(blob))
    assert found.dtype == torch.bool
    assert bool(found.all())
    whole, _ = engine.retrieve(kind(tokens), return_tuple=False)
    assert torch.equal(whole, blob)
    engine.close()


def test_huggingface_blobs_have_heads_before_tokens(make_engine):
    metadata = make_metadata(fmt="huggingface")
    engine = make_engine(metadata=metadata)
    tokens = tokens_of(2 * CHUNK + 3)
    blob = kv_of(tokens, metadata).transpose(2, 3).contiguous()
    assert engine.store(tokens, blob) == 2 * CHUNK
    whole, _ = engine.retrieve(tokens, return_tuple=False)
    assert whole.shape == (LAYERS, 2, HEADS, 2 * CHUNK, DIM)
    assert torch.equal(whole, blob[:, :, :, : 2 * CHUNK])
    layers, _ = engine.retrieve(tokens)
    assert_layers(layers, per_layer(blob[:, :, :, : 2 * CHUNK]))
    engine.clear()
    assert engine.store(tokens, per_layer(blob)) == 2 * CHUNK
    assert torch.equal(engine.retrieve(tokens, return_tuple=False)[0], blob[:, :, :, : 2 * CHUNK])
    engine.close()


def test_mla_has_one_plane(make_engine):
    metadata = make_metadata(use_mla=True, kv_shape=(LAYERS, 1, CHUNK, 1, 24))
    engine = make_engine(metadata=metadata)
    tokens = tokens_of(CHUNK)
    blob = kv_of(tokens, metadata)
    assert engine.store(tokens, per_layer(blob)) == CHUNK
    assert_layers(engine.retrieve(tokens)[0], per_layer(blob))
    engine.close()


def test_a_view_of_a_larger_tensor_can_be_stored(engine):
    """The caller's KV may be a slice, padded or strided."""
    tokens = tokens_of(2 * CHUNK)
    blob = kv_of(tokens)
    padded = torch.full((LAYERS, 2, 4 * CHUNK, HEADS, 2 * DIM), 7.0)
    padded[:, :, CHUNK : 3 * CHUNK, :, :DIM] = blob
    engine.store(tokens, padded[:, :, CHUNK : 3 * CHUNK, :, :DIM])
    assert torch.equal(engine.retrieve(tokens, return_tuple=False)[0], blob)


def test_the_stored_and_the_retrieved_are_copies(engine):
    tokens = tokens_of(CHUNK)
    blob = kv_of(tokens)
    engine.store(tokens, blob)
    expected = blob.clone()
    blob.zero_()
    first, _ = engine.retrieve(tokens, return_tuple=False)
    assert torch.equal(first, expected)
    first.zero_()
    assert torch.equal(engine.retrieve(tokens, return_tuple=False)[0], expected)


def test_a_prompt_finds_the_prefix_that_it_shares(engine):
    shared, tail, other = tokens_of(2 * CHUNK), tokens_of(CHUNK, seed=1), tokens_of(40, seed=2)
    engine.store(shared + tail, kv_of(shared + tail))
    prompt = shared + other
    assert engine.lookup(prompt) == 2 * CHUNK
    blob, found = engine.retrieve(prompt, return_tuple=False)
    assert torch.equal(blob, kv_of(shared))
    assert torch.equal(found, leading(2 * CHUNK, len(prompt)))


def test_equal_chunks_behind_other_prefixes_are_others(engine):
    same = tokens_of(CHUNK, seed=3)
    first, second = tokens_of(CHUNK, seed=1) + same, tokens_of(CHUNK, seed=2) + same
    engine.store(first, kv_of(first))
    engine.store(second, kv_of(second))
    assert torch.equal(engine.retrieve(first, return_tuple=False)[0], kv_of(first))
    assert torch.equal(engine.retrieve(second, return_tuple=False)[0], kv_of(second))


def test_nothing_found(engine):
    tokens = tokens_of(CHUNK)
    kv, found = engine.retrieve(tokens)
    assert kv == ()
    assert not found.any()
    assert engine.retrieve(tokens, return_tuple=False)[0] == ()
    assert engine.retrieve([])[0] == ()
    assert engine.lookup([]) == 0
    assert engine.store([], kv_of([])) == 0
    assert not engine.contains([])


def test_only_new_tokens_count_as_stored(engine):
    tokens = tokens_of(3 * CHUNK)
    assert engine.store(tokens[: 2 * CHUNK], kv_of(tokens[: 2 * CHUNK])) == 2 * CHUNK
    assert engine.store(tokens, kv_of(tokens)) == CHUNK
    assert engine.store(tokens, kv_of(tokens)) == 0


def test_the_first_bytes_stay(engine):
    """KV computed twice for the same tokens differs in noise; whoever reads must not see it change."""
    tokens = tokens_of(CHUNK)
    engine.store(tokens, kv_of(tokens))
    engine.store(tokens, kv_of(tokens) + 1)
    assert torch.equal(engine.retrieve(tokens, return_tuple=False)[0], kv_of(tokens))


def test_tenants_and_adapters_do_not_meet(engine):
    tokens = tokens_of(CHUNK)
    spaces = [{}, {"lora": "a"}, {"cache_salt": "a"}, {"lora": "b"}, {"lora": "a", "cache_salt": "a"}]
    for salt, space in enumerate(spaces):
        assert engine.lookup(tokens, **space) == 0
        engine.store(tokens, kv_of(tokens, salt=salt), **space)
    for salt, space in enumerate(spaces):
        assert engine.contains(tokens, **space)
        assert torch.equal(engine.retrieve(tokens, return_tuple=False, **space)[0], kv_of(tokens, salt=salt))


# Masks


@pytest.mark.parametrize("start", [0, 1, CHUNK - 1, CHUNK, CHUNK + 5, 2 * CHUNK, 3 * CHUNK])
def test_masked_tokens_are_not_retrieved(engine, start):
    tokens = tokens_of(3 * CHUNK)
    engine.store(tokens, kv_of(tokens))
    mask = torch.arange(3 * CHUNK) >= start
    blob, found = engine.retrieve(tokens, mask, return_tuple=False)
    assert torch.equal(found, mask)
    if start == 3 * CHUNK:
        assert blob == ()
    else:
        assert torch.equal(blob, kv_of(tokens)[:, :, start:])


@pytest.mark.parametrize("start", [0, 1, CHUNK, CHUNK + 1])
def test_chunks_with_a_masked_token_are_not_stored(engine, start):
    tokens = tokens_of(4 * CHUNK)
    whole = -(-start // CHUNK) * CHUNK
    assert engine.store(tokens, kv_of(tokens), torch.arange(4 * CHUNK) >= start) == 4 * CHUNK - whole
    assert engine.lookup(tokens) == (0 if whole else 4 * CHUNK)
    engine.store(tokens[:whole], kv_of(tokens[:whole]))
    assert engine.lookup(tokens) == 4 * CHUNK


# Chunks that are not full


def test_a_tail_is_left_out_unless_asked_for(engine):
    tokens = tokens_of(2 * CHUNK + 5)
    assert engine.store(tokens, kv_of(tokens)) == 2 * CHUNK
    assert engine.lookup(tokens) == 2 * CHUNK
    assert engine.contains(tokens)


def test_tails(make_engine):
    engine = make_engine(save_unfull_chunk=True)
    tokens = tokens_of(3 * CHUNK)
    prompt = tokens[: 2 * CHUNK + 5]
    assert engine.store(prompt, kv_of(prompt)) == 2 * CHUNK + 5
    assert engine.lookup(prompt) == 2 * CHUNK + 5
    blob, found = engine.retrieve(prompt, return_tuple=False)
    assert torch.equal(blob, kv_of(prompt))
    assert bool(found.all())
    # A longer prompt, and one with a tail of another length, find the full chunks.
    assert engine.lookup(tokens) == 2 * CHUNK
    assert engine.lookup(prompt[:-1]) == 2 * CHUNK
    assert engine.store(tokens, kv_of(tokens)) == CHUNK
    assert engine.lookup(tokens) == 3 * CHUNK
    assert torch.equal(engine.retrieve(tokens, return_tuple=False)[0], kv_of(tokens))
    engine.close()


def test_short_hits_count_as_none(make_engine):
    engine = make_engine(min_retrieve_tokens=2 * CHUNK)
    tokens = tokens_of(3 * CHUNK)
    engine.store(tokens, kv_of(tokens))
    short = tokens[:CHUNK] + tokens_of(2 * CHUNK, seed=9)
    assert engine.lookup(short) == 0
    assert engine.retrieve(short)[0] == ()
    with engine.prefetch(short) as lease:
        assert lease.num_tokens == 0
        assert lease.ready()
    assert engine.contains(short[:CHUNK]), "what is there is there"
    assert engine.lookup(tokens) == 3 * CHUNK
    # What is retrieved counts, not where it ends.
    assert engine.retrieve(tokens, torch.arange(3 * CHUNK) >= CHUNK)[1].sum() == 2 * CHUNK
    assert engine.retrieve(tokens, torch.arange(3 * CHUNK) >= CHUNK + 1)[1].sum() == 0
    engine.close()


# A caller's mistakes


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (
            lambda kv: kv[:, :, 1:],
            r"kv: expected torch.float32 \[3, 2, 32, 2, 8\], got torch.float32 \[3, 2, 31, 2, 8\]",
        ),
        (lambda kv: kv[1:], r"expected .*\[3, .* got .*\[2, "),
        (lambda kv: kv.bfloat16(), r"expected torch.float32 .* got torch.bfloat16"),
        (lambda kv: kv[..., :4], r"got torch.float32 \[3, 2, 32, 2, 4\]"),
        (lambda kv: per_layer(kv)[1:], r"expected 3 layers, got 2"),
        (lambda kv: [layer[:1] for layer in per_layer(kv)], r"kv\[0\]: expected a tuple of 2 tensors, got 1 tensors"),
        (lambda kv: [kv[0], kv[1], kv[2]], r"kv\[0\]: expected a tuple of 2 tensors, got Tensor"),
        (lambda kv: [(k, v[1:]) for k, v in per_layer(kv)], r"kv\[0\]\.v: expected .*\[32, 2, 8\], got .*\[31, 2, 8\]"),
        (lambda kv: [(k, None) for k, _ in per_layer(kv)], r"kv\[0\]\.v: expected .* got NoneType"),
    ],
)
def test_kv_that_does_not_fit_is_refused_in_words(engine, kv, message):
    tokens = tokens_of(2 * CHUNK)
    with pytest.raises(ValueError, match=message):
        engine.store(tokens, kv(kv_of(tokens)))
    assert engine.stats().tiers["memory"].entries == 0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(CHUNK), "expected bool"),
        (torch.ones(CHUNK + 1, dtype=torch.bool), rf"expected bool \[{CHUNK}\]"),
        (torch.arange(CHUNK) < 4, "run of False followed by a run of True"),
        (torch.arange(CHUNK) % 2 == 1, "run of False followed by a run of True"),
    ],
)
def test_a_wrong_mask_is_refused(engine, mask, message):
    tokens = tokens_of(CHUNK)
    with pytest.raises(ValueError, match=message):
        engine.store(tokens, kv_of(tokens), mask)
    with pytest.raises(ValueError, match=message):
        engine.retrieve(tokens, mask)
    with pytest.raises(ValueError, match=message):
        engine.retrieve_layer(tokens, mask)
    with pytest.raises(ValueError, match=message):
        engine.store_layer(tokens, mask)


def test_either_tensors_or_pages(engine):
    tokens = tokens_of(CHUNK)
    with pytest.raises(ValueError, match="either kv"):
        engine.store(tokens)
    with pytest.raises(ValueError, match="either kv"):
        engine.store(tokens, kv_of(tokens), slot_mapping=torch.arange(CHUNK))


def test_pages_need_a_connector(engine):
    with pytest.raises(ValueError, match="set_gpu_connector"):
        engine.store(tokens_of(CHUNK), slot_mapping=torch.arange(CHUNK))
    with pytest.raises(ValueError, match="set_gpu_connector"):
        engine.lookup(tokens_of(CHUNK), paged=True)


def test_keys_must_belong_to_the_tokens(engine):
    tokens = tokens_of(3 * CHUNK)
    keys = engine.prefix_keys(tokens)
    assert engine.store(tokens, kv_of(tokens), keys=keys) == 3 * CHUNK
    with pytest.raises(ValueError, match=r"keys: expected 3 .* got 2"):
        engine.store(tokens, kv_of(tokens), keys=keys[:2])


def test_configuration_and_metadata_must_agree(make_engine):
    with pytest.raises(ValueError, match="chunk_size=32"):
        make_engine(chunk_size=32)


def test_a_chunk_of_another_shape_is_a_miss(make_engine):
    """Two models under one name, on one directory: the bytes are not this model's."""
    engine = make_engine()
    tokens = tokens_of(CHUNK)
    (key,) = engine.prefix_keys(tokens)
    with engine.storage.allocate(PagesConnector().spec(CHUNK)) as foreign:
        engine.storage.put(key, foreign)
    kv, found = engine.retrieve(tokens)
    assert kv == ()
    assert not found.any()
    engine.close()


@pytest.mark.parametrize("fmt", ["vllm", "huggingface"])
def test_retrieving_into_memory_of_the_caller(fmt, make_engine):
    engine = make_engine(metadata=make_metadata(fmt=fmt))
    tokens = tokens_of(3 * CHUNK + 5)
    blob = kv_of(tokens)
    given = blob.transpose(2, 3).contiguous() if fmt == "huggingface" else blob
    engine.store(tokens, given)
    out = torch.full_like(given, -1.0)
    kv, found = engine.retrieve(tokens, leading(len(tokens), len(tokens), start=CHUNK), return_tuple=False, out=out)
    dim = 3 if fmt == "huggingface" else 2
    assert int(found.sum()) == 2 * CHUNK
    assert kv.data_ptr() == out.data_ptr()
    assert torch.equal(kv, given.narrow(dim, CHUNK, 2 * CHUNK))
    assert bool((out.narrow(dim, 2 * CHUNK, CHUNK + 5) == -1).all()), "the rest of it is left alone"
    for wrong in (out.narrow(dim, 0, CHUNK), out.double(), out[:1], out[0]):
        with pytest.raises(ValueError, match="out: expected"):
            engine.retrieve(tokens, return_tuple=False, out=wrong)
    engine.close()
