"""Layers whose work is replayed hold what layers hold that were worked on one by one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmcache.blend.correctors import make_corrector
from lmcache.blend.dense_runs import DenseAttention
from lmcache.blend.graph_recorder import GraphRecorder, Recording, WorkRecorder, no_garbage_collection
from lmcache.blend.host import have_in_place
from lmcache.blend.paged_batch import PagedBatchKV
from lmcache.blend.paged_blend import PagedPrompt, blend_pages
from lmcache.blend.policies import make_policy
from lmcache.blend.staged_layers import StagingRing
from lmcache.paging.paged_connector import PagedConnector
from tests.kernels.needs_triton import DEVICE, require

require()

from lmcache.blend import dense_runs, paged_layer  # noqa: E402 - needs Triton
from lmcache.blend.layer_replay import LayerReplays  # noqa: E402
from tests.blend.core.tiny_model import LAYERS, TinyHost  # noqa: E402
from tests.kernels.test_blend_in_pages import ROPES, SIZES, Engine, dense  # noqa: E402

LAYOUTS = ["kv_second_nhd", "kv_second_hnd"]


class StillHost(TinyHost):
    """A float32 host whose q, k, v and outcome lie in the same memory in all layers, as a captured model's do."""

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        held: list[torch.Tensor] = []

        def in_place(layer: int, *qkv: torch.Tensor, **scoring: Any) -> torch.Tensor:
            if not held:
                held.extend(x.float() for x in (*qkv, qkv[0]))
            *still, out = held
            for to, x in zip(still, qkv, strict=True):
                to.copy_(x)
            have_in_place(attend(layer, *still, out=out, **scoring), out)
            return out.double()

        return super().forward(rows, positions, in_place)


class Repeats:
    """Records by remembering what to do, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work: Callable[[], torch.Tensor | None]) -> Recording | None:
        self.recorded += 1
        if DEVICE.type == "cuda":
            graph = _recorder().record(work)
            assert graph is not None
            work = graph.replay
        return _Repeat(self, work)

    def forget(self) -> None: ...


class _Repeat:
    def __init__(self, counts: Repeats, work: Callable[[], torch.Tensor | None]) -> None:
        self._counts = counts
        self._work = work

    def replay(self) -> torch.Tensor | None:
        self._counts.replayed += 1
        return self._work()


class Refuses:
    def record(self, work: Callable[[], torch.Tensor | None]) -> Recording | None:
        return None

    def forget(self) -> None: ...


_recorders: list[GraphRecorder] = []


def _recorder() -> GraphRecorder:
    if not _recorders:
        _recorders.append(GraphRecorder(DEVICE))
    return _recorders[0]


def blended(
    layout: str,
    recorder: WorkRecorder | None,
    policy: str = "sampled_attention",
    corrector: str = "kriging",
    max_rows: int | None = None,
    dense: DenseAttention | None = None,
) -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    engine = Engine(layout)
    ids, prompts, used = [], [], 0
    for order in ((1, 0), (2,)):
        tokens, passages = [torch.arange(4)], []
        for document in order:
            passages.append(engine.passage(document, sum(map(len, tokens))))
            tokens.append(engine.documents[document])
        prompt = torch.cat([*tokens, engine.question])
        slots = used * SIZES.block_size + torch.arange(len(prompt))
        used += -(-len(prompt) // SIZES.block_size)
        ids.append(prompt)
        prompts.append(PagedPrompt(len(prompt), slots, 0, passages, 0.3))
    result = blend_pages(
        StillHost(engine.model, ids),
        engine.connector,
        prompts,
        ROPES,
        make_policy(policy),
        make_corrector(corrector),
        max_rows=max_rows,
        ring=StagingRing(DEVICE),
        dense=dense,
        recorder=recorder,
    )
    return result, [tensor.clone() for tensor in engine.connector.tensors]


def same(ours: tuple[Any, list[torch.Tensor]], theirs: tuple[Any, list[torch.Tensor]]) -> bool:
    (result, pages), (other_result, other_pages) = ours, theirs
    if result.plans != other_result.plans or result.charged_budgets != other_result.charged_budgets:
        return False
    return all(torch.equal(page, other) for page, other in zip(pages, other_pages, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("policy", "corrector", "max_rows"),
    [("sampled_attention", "kriging", None), ("query_attention", "none", 20), ("kv_deviation", "kriging", None)],
)
def test_replayed_layers_hold_the_same(layout: str, policy: str, corrector: str, max_rows: int | None) -> None:
    counts = Repeats()
    replayed = blended(layout, counts, policy, corrector, max_rows)
    assert counts.recorded, "nothing was recorded"
    # kv_deviation has looked at the first two of the four layers before.
    assert counts.replayed > counts.recorded or policy == "kv_deviation", "nothing was used twice"
    assert same(replayed, blended(layout, None, policy, corrector, max_rows))


def test_what_looks_at_the_layers_is_replayed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[Any] = []
    record = LayerReplays._record

    def noted(self: LayerReplays, layer: Any, take: Any, attention: Any) -> Any:
        kinds.append((take.__name__ if hasattr(take, "__name__") else "", attention is not None))
        return record(self, layer, take, attention)

    monkeypatch.setattr(LayerReplays, "_record", noted)
    blended(LAYOUTS[0], Repeats())
    assert ("_nothing", True) in kinds


def test_a_layer_that_is_replayed_in_the_wrong_pages_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LayerReplays.__init__

    def all_in_the_first(self: LayerReplays, recorder: Any, distances: Any, rows: Any, scales: Any) -> None:
        plain(self, recorder, torch.zeros_like(distances), rows, scales)

    monkeypatch.setattr(LayerReplays, "__init__", all_in_the_first)
    assert not same(blended(LAYOUTS[0], Repeats()), blended(LAYOUTS[0], None))


def test_what_cannot_be_recorded_is_done_layer_by_layer() -> None:
    assert same(blended(LAYOUTS[0], Refuses()), blended(LAYOUTS[0], None))


def test_nothing_of_a_blend_is_kept_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cycle would keep graphs, and their memory on the GPU, until Python happens to look for cycles."""
    blended(LAYOUTS[0], Refuses())  # what compiles a kernel may keep the arguments of its first call a while
    made: list[weakref.ref[Any]] = []
    begin = PagedBatchKV.__init__

    def note(self: PagedBatchKV, *args: Any, **options: Any) -> None:
        made.append(weakref.ref(self))
        begin(self, *args, **options)

    monkeypatch.setattr(PagedBatchKV, "__init__", note)
    with no_garbage_collection():
        blended(LAYOUTS[0], Refuses())
        assert made
        assert all(kv() is None for kv in made)


def test_a_corrector_that_does_not_say_so_is_not_replayed() -> None:
    counts = Repeats()
    blended(LAYOUTS[0], counts, corrector="key_shift")
    assert counts.recorded == 0


def test_the_engines_own_attention_is_called_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes by pages; what comes before it is replayed all the same."""
    for name, value in (("_MIN_QUERIES", 16), ("_MIN_KEYS", 40), ("_MIN_PAIRS", 0)):
        monkeypatch.setattr(dense_runs, name, value)
    monkeypatch.setattr(paged_layer, "run_tokens", lambda _: 16)
    calls: list[int] = []

    def counted(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return dense(*args)

    counts = Repeats()
    ours = blended(LAYOUTS[0], counts, policy="full", dense=counted)
    assert counts.replayed > counts.recorded > 0
    plain_calls, calls[:] = len(calls), []
    assert same(ours, blended(LAYOUTS[0], None, policy="full", dense=counted))
    assert plain_calls == len(calls) > 0


@pytest.mark.parametrize("distances", [None, tuple(range(LAYERS))], ids=["K and V lie otherwise", "unaligned"])
def test_layers_that_do_not_lie_alike_are_done_one_by_one(
    distances: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = blended(LAYOUTS[0], None)
    monkeypatch.setattr(PagedConnector, "layer_distances", property(lambda _: distances))
    counts = Repeats()
    assert same(blended(LAYOUTS[0], counts), expected)
    assert counts.recorded == 0
