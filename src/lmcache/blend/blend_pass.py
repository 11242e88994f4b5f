"""The blend of a batch of prompts, written once for every host."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeAlias, TypeVar

import torch

from lmcache.blend.batch import BlendBatch, BlendPrompt
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.forwards import MeasureDeviation, OnLayer, Recompute
from lmcache.blend.host import BlendHost
from lmcache.blend.layer_kv import BatchKV, PromptLoadError
from lmcache.blend.layer_room import LayerRoom
from lmcache.blend.plan import BlendPlan
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.rope import FusedRope
from lmcache.blend.score_attention import ScoreAttention
from lmcache.blend.selection import DeviationTensor, HeadReduction, SelectionContext
from lmcache.observability.ranges import Range

Output = TypeVar("Output")

MakeKV: TypeAlias = "Callable[[BlendBatch, Sequence[FusedRope | None], Corrector], BatchKV]"

# New rows that the scoring forward computes, a prompt: enough for any question, and for the start of the prompt, which
# draws much attention whatever it holds. More would cost more than what the scores are good for.
_MAX_SCORING_ROWS = 512
_SCORING_HEAD_ROWS = 64


@dataclass(frozen=True)
class BlendResult(Generic[Output]):
    """``keys[l]`` and ``values[l]`` are ``[N, kv_heads, dim]``: the whole batch, its prompts one after the other.

    One a prompt: ``plans`` say what was done; ``charged_budgets`` give the share of (reused token, layer) pairs whose
    QKV was computed afresh; ``fallbacks`` say why a prompt was computed whole, None where it was blended.

    ``output`` is None where only KV was wanted.

    ``seconds`` by phase, of the host's clock: "plan" (masks, and turning scores into rows), "probe" (forwards that a
    policy looked at), "load" (waiting for KV and re-rotating it), "correct", "recompute".
    """

    output: Output | None
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    plans: tuple[BlendPlan, ...]
    charged_budgets: tuple[float, ...]
    fallbacks: tuple[str | None, ...]
    seconds: dict[str, float]


def blend(
    host: BlendHost[Output],
    prompts: Sequence[BlendPrompt],
    ropes: Sequence[FusedRope | None],
    policy: SelectionPolicy,
    corrector: Corrector,
    *,
    seed: int = 0,
    max_rows: int | None = None,
    on_layer: OnLayer | None = None,
    kv_only: bool = False,
    room: LayerRoom | None = None,
    make_kv: MakeKV | None = None,
) -> BlendResult[Output]:
    """Blend a batch of prompts in one pass.

    A prompt of which a passage fails to load is computed whole: nothing of what was half-written for it is used. The
    other prompts of the batch are blended.

    Args:
        ropes: one a layer, None for a layer that does not rotate its keys.
        seed: for policies that draw lots.
        max_rows: no forward of the host has more; what takes more is run in pieces. ``output`` is then that of the last
            piece, which need not hold the last row of every prompt.
        on_layer: called with each layer's number, keys and values, in order, once they are final. They are let go then:
            the result has none. When a passage fails to load in the middle, it begins again with layer 0.
        kv_only: stop once the KV of the last layer is in place; there is no ``output`` then.
        room: where the layers lie meanwhile; what it gave for an earlier blend is overwritten. None: memory of their
            own.
        make_kv: how the layers are held, in place of memory of their own; ``room`` is not used then.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows}: a forward has at least one row")
    if len(ropes) != host.num_layers:
        raise ValueError(f"ropes: expected one for each of {host.num_layers} layers, got {len(ropes)}")
    fallbacks: list[str | None] = [None] * len(prompts)
    attempt = list(prompts)
    while True:
        try:
            batch = BlendBatch(attempt)
            if make_kv is not None:
                kv = make_kv(batch, ropes, corrector)
            else:
                if room is not None:
                    room.clear()
                kv = BatchKV(batch, ropes, corrector, room)
            attempted = _Blend(host, kv, policy, seed, max_rows)
            return attempted.run(tuple(fallbacks), on_layer, kv_only)
        except PromptLoadError as error:  # noqa: PERF203 - at most once a prompt
            failed = attempt[error.prompt]
            whole = BlendPlan(failed.plan.num_tokens, suffix_tokens=failed.plan.suffix_tokens)
            attempt[error.prompt] = replace(failed, plan=whole, sources=())
            fallbacks[error.prompt] = str(error)


class _Blend(Generic[Output]):
    """One attempt at a batch. Also the probe through which the policy looks."""

    def __init__(
        self,
        host: BlendHost[Output],
        kv: BatchKV,
        policy: SelectionPolicy,
        seed: int,
        max_rows: int | None,
    ) -> None:
        self._host = host
        self._batch = kv.batch
        self._kv = kv
        self._policy = policy
        self._seed = seed
        self._max_rows = max_rows
        self._probing = 0.0
        self._early = torch.zeros_like(self._batch.forced)

    def run(self, fallbacks: tuple[str | None, ...], on_layer: OnLayer | None, kv_only: bool) -> BlendResult[Output]:
        start = time.perf_counter()
        computed = self._select()
        planned = time.perf_counter()
        before = self._moving()
        ends_at = self._host.num_layers - 1 if kv_only else None
        with Range("recompute"):
            early = self._early if bool(self._early.any()) else None
            late = computed & ~self._early
            if early is not None:
                self._kv.correct_again()
            forward = Recompute(self._batch, self._kv, late, self._max_rows, on_layer, ends_at, early)
            output = forward.run(self._host)
        assert kv_only or output is not None, "the host stopped a forward that nobody asked it to stop"
        recompute = time.perf_counter() - planned - (self._moving() - before)
        # Only now: an accelerator would have had to wait for it.
        plans = tuple(
            plan.select(computed[begin:end], self._policy.name)
            for plan, (begin, end) in zip(self._batch.plans, self._batch.prompts, strict=True)
        )
        keys, values = self._kv.tensors()
        return BlendResult(
            output=output,
            keys=keys,
            values=values,
            plans=plans,
            charged_budgets=self._kv.charged_budgets(self._host.num_layers),
            fallbacks=fallbacks,
            seconds={
                "plan": planned - start - self._probing,
                "probe": self._probing - before,
                **self._kv.seconds,
                "recompute": recompute,
            },
        )

    def _select(self) -> torch.Tensor:
        batch = self._batch
        if not bool(batch.reusable.any()):
            return batch.forced.clone()
        context = SelectionContext(
            num_layers=self._host.num_layers,
            prompts=batch.prompts,
            spans=batch.moved_spans,
            reusable=batch.reusable,
            forced=batch.forced,
            ratios=batch.ratios,
            probe=self,
            seed=self._seed,
        )
        return self._policy.select(context) & ~(batch.exact & ~batch.forced)

    def _moving(self) -> float:
        return sum(self._kv.seconds.values())

    # The probe

    @Range("probe")
    def attention_received(
        self, *, span: int, layers: Sequence[int] | None, heads: HeadReduction, computed: torch.Tensor | None
    ) -> torch.Tensor:
        wanted = range(self._host.num_layers) if layers is None else layers
        start = time.perf_counter()
        rows, all_new = self._scoring_rows()
        # They would not see the new rows that are left out.
        early = computed if all_new else None
        if early is not None:
            rows |= early
            self._early |= early & ~self._batch.forced
        forward = ScoreAttention(
            self._batch,
            self._kv,
            rows,
            span=span,
            layers=wanted,
            heads=heads,
            correct_up_to=None if early is None else self._host.num_layers - 1,
            max_rows=self._max_rows,
        )
        forward.run(self._host)
        received = self._agreed(forward.received, heads)
        self._probing += time.perf_counter() - start
        return received

    @Range("probe")
    def deviation(self, layer: int, tensor: DeviationTensor, rows: torch.Tensor | None) -> torch.Tensor:
        start = time.perf_counter()
        looked_at = ~self._batch.exact if rows is None else rows
        forward = MeasureDeviation(self._batch, self._kv, looked_at | self._batch.forced, layer, tensor, self._max_rows)
        forward.run(self._host)
        deviation = self._agreed(forward.deviation, "mean")
        self._probing += time.perf_counter() - start
        return deviation

    def _agreed(self, scores: torch.Tensor, heads: HeadReduction) -> torch.Tensor:
        """Ranks must choose the same tokens, each by what the heads of all say."""
        agreed_scores = getattr(self._host, "agreed_scores", None)
        return scores if agreed_scores is None else agreed_scores(scores, heads)

    def _scoring_rows(self) -> tuple[torch.Tensor, bool]:
        """bool ``[N]``: the new rows of each prompt that reuses anything, thinned out where there are many; and whether
        that was nowhere."""
        computed = torch.zeros_like(self._batch.forced)
        all_new = True
        for start, end in self._batch.prompts:
            if not bool(self._batch.reusable[start:end].any()):
                continue
            new = start + torch.nonzero(self._batch.forced[start:end])[:, 0]
            if len(new) > _MAX_SCORING_ROWS:
                tail = _MAX_SCORING_ROWS - _SCORING_HEAD_ROWS
                new = torch.cat([new[:_SCORING_HEAD_ROWS], new[-tail:]])
                all_new = False
            computed[new] = True
        return computed, all_new
