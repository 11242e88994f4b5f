"""SPTBlendRetriever on a real LMCacheEngine, and what it finds blended by CacheBlendImpl."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from lmcache.blend.executor import CacheBlendImpl
from lmcache.blend.retriever import SPTBlendRetriever
from tests.engine.helpers import BrokenTier, SlowTier, kv_of, make_engine, make_metadata, tokens_of

CHUNK, LAYERS = 16, 3
SPT = [40001, 40002]


def passage(length, seed):
    """Tokens that end with the separator."""
    return tokens_of(length - len(SPT), seed) + SPT


SYSTEM, DOC_A, DOC_B = passage(CHUNK, 1), passage(2 * CHUNK + 5, 2), passage(3 * CHUNK, 3)
QUESTION = tokens_of(7, 4)


def joined(parts):
    return list(chain.from_iterable(parts))


def blob_of(tokens, metadata):
    blob = kv_of(tokens, metadata)
    return blob.transpose(2, 3).contiguous() if metadata.fmt == "huggingface" else blob


class World:
    """An engine that holds the passages, each stored on its own, and a retriever on it."""

    def __init__(self, fmt="vllm", tiers=(), **config):
        self.metadata = make_metadata(fmt=fmt)
        self.engine = make_engine(tiers, metadata=self.metadata, **config)
        self.retriever = SPTBlendRetriever(torch.tensor(SPT), self.engine, self.metadata)
        for tokens in (SYSTEM, DOC_A, DOC_B):
            self.engine.store(tokens, blob_of(tokens, self.metadata))

    def task(self, *prompts):
        prompts = [joined(parts) for parts in prompts]
        bounds = torch.tensor([0, *map(len, prompts)]).cumsum(0)
        return self.retriever.new_request(torch.tensor(joined(prompts)), bounds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.retriever.close()
        self.engine.close()


def assert_found(task, metadata, parts):
    """``parts``: (tokens, how many of them are found), one after the other."""
    total = sum(len(tokens) for tokens, _ in parts)
    for layer in range(LAYERS):
        result = task.result(layer)
        valid, positions, start = torch.zeros(total), torch.zeros(total), 0
        for tokens, count in parts:
            rows = slice(start, start + count)
            valid[rows], positions[rows] = 1, torch.arange(count)
            expected = kv_of(tokens, metadata)[layer, :, :count]
            for got, plane in ((result.k, expected[0]), (result.v, expected[1])):
                got = got if metadata.fmt == "vllm" else got.transpose(0, 1)
                assert len(got) == total
                assert torch.equal(got[rows], plane)
            start += len(tokens)
        assert result.valid_mask.tolist() == valid.tolist()
        assert result.original_positions.tolist() == positions.tolist()


@pytest.mark.parametrize("fmt", ["vllm", "huggingface"])
@pytest.mark.parametrize(("tails", "found_of_a"), [(True, 2 * CHUNK + 5), (False, 2 * CHUNK)])
def test_passages_are_found_in_any_order(fmt, tails, found_of_a):
    with World(fmt, save_unfull_chunk=tails) as world:
        task = world.task([SYSTEM, DOC_B, DOC_A, QUESTION])
        found = [(SYSTEM, CHUNK), (DOC_B, 3 * CHUNK), (DOC_A, found_of_a), (QUESTION, 0)]
        assert_found(task, world.metadata, found)


def test_several_requests_share_passages():
    with World(save_unfull_chunk=True) as world:
        task = world.task([SYSTEM, DOC_A, QUESTION], [QUESTION], [DOC_A, DOC_A])
        a = (DOC_A, len(DOC_A))
        assert_found(task, world.metadata, [(SYSTEM, CHUNK), a, (QUESTION, 0), (QUESTION, 0), a, a])


def test_a_passage_that_only_begins_like_a_stored_one():
    with World() as world:
        other = DOC_B[: CHUNK + 3] + passage(10, 9)
        assert_found(world.task([other]), world.metadata, [(other, CHUNK)])


def test_nothing_is_stored():
    with World() as world:
        world.engine.clear()
        result = world.task([SYSTEM, QUESTION]).result(0)
        assert result.k is None
        assert not result.valid_mask.any()


def test_an_engine_that_was_closed_has_nothing():
    with World() as world:
        world.engine.close()
        assert world.task([SYSTEM]).result(0).k is None


def test_a_tier_that_fails_is_a_miss():
    with World(tiers=[BrokenTier()], local_disk="unused") as world:
        unknown = passage(CHUNK, 8)
        assert_found(world.task([unknown, DOC_B]), world.metadata, [(unknown, 0), (DOC_B, 3 * CHUNK)])


def test_passages_that_only_a_slower_tier_holds():
    slow = SlowTier(hold_reads=False)
    with World(tiers=[slow], local_disk="unused", local_cpu=False) as world:
        assert_found(world.task([DOC_B, SYSTEM]), world.metadata, [(DOC_B, 3 * CHUNK), (SYSTEM, CHUNK)])


@pytest.mark.parametrize("fmt", ["vllm", "huggingface"])
def test_what_is_found_can_be_blended(fmt):
    """From the store to the attention of every layer, with encoders that stand in for a rotation."""
    with World(fmt, save_unfull_chunk=True) as world:
        parts = [SYSTEM, DOC_B, DOC_A, QUESTION]
        task = world.task(parts)
        total, token_dim = sum(map(len, parts)), 0 if fmt == "vllm" else 1
        places = torch.cat([torch.arange(len(part)) for part in parts])
        fresh = blob_of(joined(parts), world.metadata)

        def shift(sign):
            column = (-1, 1, 1) if token_dim == 0 else (1, -1, 1)
            return lambda positions, q, k: (q, k + sign * positions.view(column))

        executor = CacheBlendImpl(0.1)
        executor.set_positional_encoder(shift(1))
        executor.set_reverse_positional_encoder(shift(-1))
        rows = torch.arange(total)
        for layer in range(LAYERS):
            found = task.result(layer)
            k, v = (plane.index_select(token_dim, rows) for plane in fresh[layer])
            output = executor.blend(
                layer, found.k, found.v, found.valid_mask, found.original_positions,
                k, k, v, rows, torch.tensor([0, total]), token_dim,
            )  # fmt: skip
            rows = output.local_indices
        assert len(rows) == len(QUESTION) + int((total - len(QUESTION)) * 0.1)
        assert rows[-len(QUESTION) :].tolist() == list(range(total - len(QUESTION), total))
        kept = torch.tensor([row not in rows for row in range(total)])
        stored_k, stored_v = (torch.cat([kv_of(part)[LAYERS - 1, plane] for part in parts]) for plane in (0, 1))
        moved_k = stored_k + (torch.arange(total) - places).view(-1, 1, 1)
        got_k, got_v = (tensor if token_dim == 0 else tensor.transpose(0, 1) for tensor in (output.k, output.v))
        assert torch.equal(got_k[kept], moved_k[kept])
        assert torch.equal(got_v[kept], stored_v[kept])
        fresh_k, fresh_v = kv_of(joined(parts))[LAYERS - 1]
        assert torch.equal(got_k[rows], fresh_k[rows])
        assert torch.equal(got_v[rows], fresh_v[rows])
