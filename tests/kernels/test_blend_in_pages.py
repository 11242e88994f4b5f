"""A blend by kernels, in pages, gives what the blend in tensors of its own gives."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from lmcache.blend import dense_runs, paged_layer
from lmcache.blend.chunk_source import ChunkPart
from lmcache.blend.correctors import make_corrector
from lmcache.blend.dense_runs import DenseAttention, DenseRuns
from lmcache.blend.paged_batch import can_blend_in_pages
from lmcache.blend.paged_blend import PagedPrompt, blend_pages
from lmcache.blend.passage_lease import HeldPassage
from lmcache.blend.policies import make_policy
from lmcache.blend.rope import FusedRope, RopeFrequencies
from lmcache.blend.staged_ahead import StagedAhead
from lmcache.blend.staged_layers import StagingRing
from lmcache.memory.memory_obj import MemoryObj
from lmcache.paging.token_connector import TokenConnector
from tests.blend.core.tiny_model import DIM, KV_HEADS, LAYERS, VOCAB, TinyHost, TinyModel
from tests.kernels.needs_triton import DEVICE, require
from tests.paging.worlds import WORLDS, Sizes

require()

CHUNK = 16
SIZES = Sizes(layers=LAYERS, blocks=24, block_size=8, heads=KV_HEADS, dim=DIM, dtype=torch.float32, device=str(DEVICE))
LAYOUTS = ["kv_second_nhd", "kv_second_hnd"]
FREQUENCIES = 1.0 / (10_000.0 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))
ROPES = [FusedRope(RopeFrequencies(FREQUENCIES), head_size=DIM)] * LAYERS


class FloatHost(TinyHost):
    """A tiny model whose attention is float32, as kernels want it."""

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        def in_float(layer: int, *qkv: torch.Tensor, **scoring: Any) -> torch.Tensor:
            return attend(layer, *map(self.given, qkv), **scoring).double()

        return super().forward(rows, positions, in_float)

    def given(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as it is handed over."""
        return x.float()


class Engine:
    """Pages of one layout, with passages that were computed elsewhere and lie in chunks."""

    def __init__(self, layout: str, sizes: Sizes = SIZES) -> None:
        world = WORLDS[layout](sizes)
        self.model = TinyModel(device=str(DEVICE))
        self.connector = TokenConnector(world.layout, world.tensors)
        generator = torch.Generator().manual_seed(3)
        for layer in range(LAYERS):
            for plane, of in enumerate(self.connector.kv_layout.plane_views(self.connector.tensors, layer)):
                of.copy_(self.kept(torch.randn(of.shape, generator=generator), layer, plane))
        self.documents = [torch.randint(VOCAB, (40,), generator=generator) for _ in range(3)]
        self.chunks = [self._kept(document, start) for document, start in zip(self.documents, (0, 7, 30), strict=True)]
        self.question = torch.randint(VOCAB, (6,), generator=generator)

    def kept(self, numbers: torch.Tensor, layer: int, plane: int) -> torch.Tensor:
        """As the pages and chunks hold them."""
        return numbers

    def _kept(self, document: torch.Tensor, start: int) -> list[MemoryObj]:
        _, kv = TinyModel().prefill(document, start)  # with loops, which a GPU is slow at
        objs = []
        for first in range(0, len(document), CHUNK):
            spec = self.connector.spec(min(CHUNK, len(document) - first))
            obj = MemoryObj(spec, torch.zeros(-(-spec.nbytes // 4096) * 4096, dtype=torch.uint8), 0, lambda _: None)
            for layer, pair in enumerate(kv):
                for plane, x in enumerate((pair.k, pair.v)):
                    obj.tensor[layer, plane] = self.kept(x[first : first + CHUNK], layer, plane)
            objs.append(obj)
        return objs

    def passage(self, document: int, at: int, skipped: int = 0) -> HeldPassage:
        """From its token ``skipped`` on, so that it begins in the midst of a chunk."""
        parts, left = [], skipped
        for obj in self.chunks[document]:
            dropped = min(left, obj.spec.num_tokens)
            left -= dropped
            if dropped < obj.spec.num_tokens:
                parts.append(ChunkPart(obj, dropped, obj.spec.num_tokens - dropped))
        old = (0, 7, 30)[document] + skipped
        return HeldPassage(at, at + 40 - skipped, old, tuple(parts))


def dense(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, runs: DenseRuns, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an engine's own attention would give, spelled out."""
    q = q[runs.order]
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q), device=q.device)
    bounds = runs.starts.tolist()
    for run, (start, end) in enumerate(pairwise(bounds)):
        count = int(runs.keys_in_order[run])
        keys, values = (pages[runs.blocks[run].long()].flatten(0, 1)[:count] for pages in (key_pages, value_pages))
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
        scores = q[start:end].transpose(0, 1) @ keys.transpose(1, 2) * scale
        out[start:end] = (scores.softmax(-1) @ values).transpose(0, 1)
        lse[:, start:end] = scores.logsumexp(-1)
    DENSE_CALLS.append(len(bounds) - 1)
    assert runs.keys.tolist() == runs.keys_in_order.tolist()[::-1]
    return out, lse


DENSE_CALLS: list[int] = []


def test_the_engines_own_attention_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_MIN_QUERIES", 32), ("_MIN_KEYS", 40), ("_MIN_PAIRS", 0)):
        monkeypatch.setattr(dense_runs, name, value)
    monkeypatch.setattr(paged_layer, "run_tokens", lambda _: 16)
    DENSE_CALLS.clear()
    compare("kv_second_nhd", "sampled_attention", "kriging", 0.6, None, dense)
    assert max(DENSE_CALLS) > 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("policy", "corrector", "ratio", "max_rows"),
    [
        ("none", "none", 0.0, None),
        ("kv_deviation", "none", 0.2, None),
        ("sampled_attention", "kriging", 0.2, None),
        ("sampled_attention", "key_shift", 0.2, 20),
        ("query_attention", "local_key_shift", 0.1, 16),
        ("full", "kriging", 1.0, None),
    ],
)
def test_pages_hold_what_a_blend_in_tensors_writes(
    layout: str, policy: str, corrector: str, ratio: float, max_rows: int | None
) -> None:
    compare(layout, policy, corrector, ratio, max_rows, None)


@pytest.mark.parametrize("same", [True, False])
def test_what_was_staged_ahead_is_used_for_its_own_prompt_alone(same: bool) -> None:
    def blended(ahead_of: int | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        engine = Engine("kv_second_nhd")
        ids, prompts = two_prompts(engine, 0.2)
        ring, ahead = StagingRing(DEVICE), None
        if ahead_of is not None:
            nowhere = replace(prompts[ahead_of], slots=torch.zeros_like(prompts[ahead_of].slots))
            ahead = StagedAhead(nowhere.planned(engine.connector), LAYERS, engine.connector.kv_layout, ring)
        blend_pages(
            FloatHost(engine.model, ids[:1]),
            engine.connector,
            prompts[:1],
            ROPES,
            make_policy("sampled_attention"),
            make_corrector("kriging"),
            ring=ring,
            ahead=ahead,
        )
        assert ahead is None or ahead.take([]) is None, "given out twice"
        return [tensor.clone() for tensor in engine.connector.tensors]

    for ours, theirs in zip(blended(0 if same else 1), blended(None), strict=True):
        assert torch.equal(ours, theirs)


def two_prompts(engine: Engine, ratio: float) -> tuple[list[torch.Tensor], list[PagedPrompt]]:
    """Two passages behind an exact prefix, one of them cut; and one passage behind new tokens."""
    ids, prompts, used = [], [], 0
    for order, exact, new in (((1, 0), 10, 0), ((2,), 0, 4)):
        tokens = [torch.arange(exact + new)]
        passages = []
        for document in order:
            at = sum(map(len, tokens))
            passages.append(engine.passage(document, at, skipped=5 if document == 0 else 0))
            tokens.append(engine.documents[document][5 if document == 0 else 0 :])
        prompt = torch.cat([*tokens, engine.question])
        slots = used * SIZES.block_size + torch.arange(len(prompt))
        used += -(-len(prompt) // SIZES.block_size)
        ids.append(prompt)
        prompts.append(PagedPrompt(len(prompt), slots, exact, passages, ratio))
    return ids, prompts


def compare(
    layout: str, policy: str, corrector: str, ratio: float, max_rows: int | None, dense: DenseAttention | None
) -> None:
    written = []
    for by_kernels in (False, True):
        torch.manual_seed(0)
        engine = Engine(layout)
        ids, prompts = two_prompts(engine, ratio)
        before = [plane.clone() for plane in engine.connector.kv_layout.plane_views(engine.connector.tensors, 0)]
        assert can_blend_in_pages(engine.connector, ROPES)
        result = blend_pages(
            FloatHost(engine.model, ids),
            engine.connector,
            prompts,
            ROPES,
            make_policy(policy),
            make_corrector(corrector),
            max_rows=max_rows,
            ring=StagingRing(DEVICE) if by_kernels else None,
            dense=dense,
        )
        after = engine.connector.kv_layout.plane_views(engine.connector.tensors, 0)
        exact_slots = prompts[0].slots[:10]
        for plane, old in zip(after, before, strict=True):
            index = engine.connector.token_index(exact_slots).blocks_and_offsets
            assert torch.equal(plane[index], old[index]), "the exact prefix is not ours to write"
        every = engine.connector.token_index(torch.cat([prompt.slots for prompt in prompts]))
        pages = [engine.connector.read_tokens(layer, every) for layer in range(LAYERS)]
        written.append((result.plans, result.charged_budgets, pages))
    (plans, budgets, expected), (their_plans, their_budgets, pages) = written
    assert plans == their_plans
    assert budgets == their_budgets
    for layer, (ours, theirs) in enumerate(zip(expected, pages, strict=True)):
        for name, a, b in zip("KV", ours, theirs, strict=True):
            torch.testing.assert_close(b, a, atol=2e-4, rtol=1e-3, msg=lambda m, n=name, i=layer: f"{n} {i}: {m}")
