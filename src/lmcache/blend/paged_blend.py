"""Blends prompts whose KV belongs into an engine's pages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from lmcache.blend.batch import BlendPrompt
from lmcache.blend.blend_pass import BlendResult, blend
from lmcache.blend.chunk_source import ChunkSource, PagesSource
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.dense_runs import DenseAttention
from lmcache.blend.fp8_pages import Fp8Pages
from lmcache.blend.graph_recorder import WorkRecorder
from lmcache.blend.host import BlendHost
from lmcache.blend.kv_source import KVSource
from lmcache.blend.layer_room import LayerRoom
from lmcache.blend.paged_batch import PagedBatchKV
from lmcache.blend.passage_lease import HeldPassage
from lmcache.blend.plan import BlendPlan, ReusedSpan
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.rope import FusedRope
from lmcache.blend.staged_ahead import StagedAhead
from lmcache.blend.staged_layers import StagingRing
from lmcache.paging.paged_connector import PagedConnector

Output = TypeVar("Output")


@dataclass(frozen=True)
class PagedPrompt:
    """One prompt of ``num_tokens`` tokens.

    ``slots`` (int64 ``[n]``, ``n ≤ num_tokens``) are the pages' slots of its first tokens; a last token without one is
    computed and not kept. The KV of the first ``exact_tokens`` is in the pages already and stays as it is.
    """

    num_tokens: int
    slots: torch.Tensor
    exact_tokens: int
    passages: Sequence[HeldPassage]
    ratio: float

    def planned(self, connector: PagedConnector) -> BlendPrompt:
        """What the blend is to do with it; passages that overlap are cut."""
        sources: list[KVSource] = []
        hits: list[ReusedSpan] = []
        if self.exact_tokens:
            sources.append(PagesSource(connector, self.slots[: self.exact_tokens]))
            hits.append(ReusedSpan(0, self.exact_tokens, source=0, exact=True))
        for passage in self.passages:
            old_end = passage.old_start + passage.end - passage.start
            hits.append(ReusedSpan(passage.start, passage.end, len(sources), old_start=passage.old_start))
            sources.append(ChunkSource(connector, passage.parts, length=old_end))
        return BlendPrompt(BlendPlan.of(self.num_tokens, hits), sources, self.ratio)


def blend_pages(
    host: BlendHost[Output],
    connector: PagedConnector,
    prompts: Sequence[PagedPrompt],
    ropes: Sequence[FusedRope | None],
    policy: SelectionPolicy,
    corrector: Corrector,
    *,
    max_rows: int | None = None,
    seed: int = 0,
    room: LayerRoom | None = None,
    ring: StagingRing | None = None,
    dense: DenseAttention | None = None,
    recorder: WorkRecorder | None = None,
    fp8: Fp8Pages | None = None,
    ahead: StagedAhead | None = None,
) -> BlendResult[Output]:
    """Blend ``prompts`` in one pass and write the KV of all but their exact tokens into the pages, layer by layer.

    When it raises, what the pages hold behind the exact tokens of these prompts is undefined. ``seconds`` of the
    result has "write" besides the phases of :func:`lmcache.blend.blend_pass.blend`.

    With ``ring``, and a slot for every token, kernels blend in the pages themselves (see
    :func:`lmcache.blend.paged_batch.can_blend_in_pages`), helped by the engine's own attention, ``dense``, by
    ``recorder``, and by what was staged ``ahead``, if it was for these prompts; otherwise in memory that ``room``
    gives, which ``fp8`` pages cannot be.

    Raises:
        ValueError: pages in fp8, but no ``ring``, or a token without a slot.
    """
    planned = [prompt.planned(connector) for prompt in prompts]
    every_slot = torch.cat([prompt.slots for prompt in prompts])
    if ring is not None and len(every_slot) == sum(prompt.num_tokens for prompt in prompts):
        exact = torch.cat([torch.arange(prompt.num_tokens) < prompt.exact_tokens for prompt in prompts])
        return blend(
            host,
            planned,
            ropes,
            policy,
            corrector,
            seed=seed,
            max_rows=max_rows,
            kv_only=True,
            make_kv=partial(
                PagedBatchKV,
                connector=connector,
                slots=every_slot,
                exact=exact,
                ring=ring,
                dense=dense,
                recorder=recorder,
                fp8=fp8,
                ahead=ahead,
            ),
        )
    if fp8 is not None:
        raise ValueError("prompts are blended in fp8 pages by kernels alone, with a slot for every token")
    written, slots = _rows_to_write(prompts)
    index = connector.token_index(slots)
    rows: torch.Tensor | slice = written.to(connector.tensors[0].device)
    if len(prompts) == 1:
        rows = slice(int(written[0]), int(written[-1]) + 1)
    writing = 0.0

    def write(layer_id: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        nonlocal writing
        start = time.perf_counter()
        connector.write_tokens(layer_id, index, (keys[rows], values[rows]))
        writing += time.perf_counter() - start

    result = blend(
        host,
        planned,
        ropes,
        policy,
        corrector,
        seed=seed,
        max_rows=max_rows,
        on_layer=write,
        kv_only=True,
        room=room,
    )
    result.seconds["recompute"] -= writing
    result.seconds["write"] = writing
    return result


def _rows_to_write(prompts: Sequence[PagedPrompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the batch, and the slot of each; both int64."""
    rows, slots, start = [], [], 0
    for prompt in prompts:
        rows.append(torch.arange(start + prompt.exact_tokens, start + len(prompt.slots)))
        slots.append(prompt.slots[prompt.exact_tokens :])
        start += prompt.num_tokens
    return torch.cat(rows), torch.cat(slots)
