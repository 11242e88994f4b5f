"""The worker role's half of CacheBlend: runs the blends of a step on vLLM's model, into vLLM's pages."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lmcache.blend.correctors import make_corrector
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.fp8_pages import Fp8Pages
from lmcache.blend.graph_recorder import GraphRecorder, WorkRecorder
from lmcache.blend.layer_room import LayerRoom
from lmcache.blend.paged_batch import can_blend_in_pages
from lmcache.blend.paged_blend import PagedPrompt, blend_pages
from lmcache.blend.plan import BlendPlan
from lmcache.blend.policies import make_policy
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.rope import FusedRope
from lmcache.blend.staged_ahead import StagedAhead
from lmcache.blend.staged_layers import StagingRing
from lmcache.blend.warm_kernels import AttentionKind, warm_kernels
from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.blend.ropes import find_ropes
from lmcache.integration.vllm.attention_writer import AttentionWriter
from lmcache.integration.vllm.blend.flash_attention import flash_attention
from lmcache.integration.vllm.blend.fp8_layers import fp8_pages, scales_of
from lmcache.integration.vllm.blend.host import VLLMHost, VLLMModel
from lmcache.integration.vllm.blend.model_finder import find_model
from lmcache.integration.vllm.blend.scheduling import PreparedBlend
from lmcache.integration.vllm.blend.scoring import Scoring
from lmcache.keys import Tokens
from lmcache.memory.int_tensor import int_tensor
from lmcache.observability.logging import init_logger
from lmcache.paging.paged_connector import PagedConnector

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class PagedRequest(NamedTuple):
    """A request that is to be blended, and the slots of its tokens (int64, on the CPU, as many as have one)."""

    req_id: str
    prepared: PreparedBlend
    slots: torch.Tensor


@dataclass(frozen=True)
class BlendReport:
    """What was done for one request. ``fallback`` says why it was computed whole, by our own pass."""

    plan: BlendPlan
    charged_budget: float
    fallback: str | None
    seconds: dict[str, float]

    @property
    def recomputed(self) -> list[list[int]]:
        """Ranges of reused tokens that were computed all the same."""
        return [list(tokens) for tokens in self.plan.selected]


class Blender:
    """One for a model and its pages."""

    def __init__(
        self,
        model: VLLMModel,
        ropes: Sequence[FusedRope | None],
        connector: PagedConnector,
        max_rows: int,
        fp8: Fp8Pages | None = None,
    ) -> None:
        """``max_rows``: tokens of a forward that vLLM has sized its memory for. ``fp8``: None where the pages hold real
        numbers.

        Raises:
            UnsupportedModelError: nothing here can blend in these pages.
        """
        self._model = model
        self._ropes = ropes
        self._connector = connector
        self._max_rows = max_rows
        self._room = LayerRoom()
        self._fp8 = fp8
        in_pages = can_blend_in_pages(connector, ropes, fp8)
        if fp8 is not None and not in_pages:
            raise UnsupportedModelError(
                model.model,
                "its KV pages are fp8, which kernels alone can blend: with Triton, from compute capability 8.9 on",
            )
        self._ring = StagingRing(connector.tensors[0].device) if in_pages else None
        self._recorder: WorkRecorder | None = None
        self._ahead: tuple[PreparedBlend, StagedAhead] | None = None
        self._thread: int | None = None
        if not in_pages and connector.tensors[0].device.type != "cpu":
            logger.warning("CacheBlend is slow here: its kernels do not know pages like these, or Triton is missing")
        self._dense = flash_attention(next(iter(model.layers.values()))) if in_pages and fp8 is None else None

    @classmethod
    def find(cls, vllm_config: VllmConfig, connector: PagedConnector, layer_names: Sequence[str]) -> Blender:
        """Args:
            layer_names: of the layers whose pages ``connector`` moves, in its order.

        Raises:
            UnsupportedModelError: what vLLM has loaded cannot be blended, or was not found.
        """
        layer = vllm_config.compilation_config.static_forward_context.get(layer_names[0])
        found = find_model(layer) if layer is not None else None
        if found is None:
            raise UnsupportedModelError(
                layer,
                "the model was not found: neither through the plug-in (is VLLM_PLUGINS set, without 'lmcache'?) nor in "
                "the model runner",
            )
        model = VLLMModel(found, vllm_config)
        if list(model.layers) != list(layer_names):
            raise UnsupportedModelError(found, "its attention layers are not those of vLLM's KV pages, in their order")
        if connector.kv_layout.packed:
            raise UnsupportedModelError(
                found, f"pages of the layout {connector.kv_layout.name!r} are packed: single tokens cannot be read"
            )
        writer = AttentionWriter(vllm_config, list(layer_names))
        fp8 = fp8_pages(found, list(model.layers.values()), connector, writer)
        return cls(model, find_ropes(model), connector, vllm_config.scheduler_config.max_num_batched_tokens, fp8)

    def warm_up(self, policy: SelectionPolicy, corrector: Corrector, *, cuda_graphs: bool) -> None:
        """Have the kernels compiled that ``policy`` and ``corrector`` need, and with ``cuda_graphs`` the model's small
        forwards captured, and from then on our own kernels too. Only while the pages are empty."""
        if self._ring is None:
            return
        layers = []
        for layer in self._model.layers.values():
            scoring = Scoring.of(layer.impl)
            layers.append(
                AttentionKind(layer.num_heads, scoring.scale, scoring.sliding_window, scoring.softcap, scoring.sinks)
            )
        ways = [(policy, corrector), (make_policy("kv_deviation"), make_corrector("none"))]
        warm_kernels(self._connector, self._ropes, layers, self._ring, ways, self._pages_now())
        if cuda_graphs and self._ring.device.type == "cuda":
            self._model.capture(self._max_rows)
            self._recorder = GraphRecorder(self._ring.device)

    def _pages_now(self) -> Fp8Pages | None:
        """With the scales that vLLM's layers have now."""
        if self._fp8 is not None and (scales := scales_of(self._model.layers.values())) != self._fp8.scales:
            self._fp8 = replace(self._fp8, scales=scales)
        return self._fp8

    @torch.inference_mode()
    def stage(self, prepared: PreparedBlend) -> None:
        """Have the KV of ``prepared`` on its way while vLLM prepares the step that will blend it. Of several that are
        promised for one step the first is staged; together with others it is not used."""
        if self._ring is None or self._ring.stream is None or (self._ahead and self._ahead[0] is prepared):
            return
        if self._thread not in (None, threading.get_ident()):
            return  # a blend may be under way
        nowhere = torch.zeros(prepared.exact_tokens, dtype=torch.int64)
        prompt = _paged_prompt(prepared, nowhere).planned(self._connector)
        self._ahead = prepared, StagedAhead(prompt, len(self._ropes), self._connector.kv_layout, self._ring)

    def _staged(self, group: list[PagedRequest]) -> StagedAhead | None:
        ahead, self._ahead = self._ahead, None
        alone = ahead is not None and len(group) == 1 and group[0].prepared is ahead[0]
        return ahead[1] if ahead is not None and alone else None

    @torch.inference_mode()
    def compute(self, token_ids: Tokens, slots: torch.Tensor, start: int) -> None:
        """Fill the pages of a prompt as vLLM itself would: compute the KV of ``token_ids`` from ``start`` on.

        Args:
            slots: int64, on the CPU: where the KV of each token belongs. That of the first ``start`` is there.
        """
        prompt = PagedPrompt(len(token_ids), slots, start, passages=(), ratio=0.0)
        blend_pages(
            VLLMHost(self._model, [int_tensor(token_ids)]),
            self._connector,
            [prompt],
            self._ropes,
            make_policy("none"),
            make_corrector("none"),
            max_rows=self._max_rows,
            room=self._room,
            ring=self._ring,
            dense=self._dense,
            fp8=self._pages_now(),
        )

    @torch.inference_mode()
    def run(self, requests: Sequence[PagedRequest]) -> dict[str, BlendReport | Exception]:
        """Fill the pages of all ``requests``: one pass for those with the same policy and corrector.

        By request: what was done, or why its pages must not be used.
        """
        self._thread = threading.get_ident()
        together: defaultdict[tuple[int, int], list[PagedRequest]] = defaultdict(list)
        for request in requests:
            options = request.prepared.options
            together[id(options.policy), id(options.corrector)].append(request)
        done: dict[str, BlendReport | Exception] = {}
        for group in together.values():
            done.update(self._run_group(group))
        return done

    def _run_group(self, group: list[PagedRequest]) -> dict[str, BlendReport | Exception]:
        try:
            return self._blend(group)
        except Exception as error:
            if self._ring is not None:
                self._ring.join()  # the chunks are let go once the current stream has come past
            if len(group) == 1:
                return {group[0].req_id: error}
        # One of them may have spoilt it for all.
        done: dict[str, BlendReport | Exception] = {}
        for request in group:
            done.update(self._run_group([request]))
        return done

    def _blend(self, group: list[PagedRequest]) -> dict[str, BlendReport | Exception]:
        start = time.perf_counter()
        prompts = [
            # The last token is vLLM's own; it writes its slot itself, and after us.
            _paged_prompt(prepared, slots if self._ring is not None else slots[: len(prepared.token_ids) - 1])
            for _, prepared, slots in group
        ]
        host = VLLMHost(self._model, [int_tensor(prepared.token_ids) for _, prepared, _ in group])
        options = group[0].prepared.options
        result = blend_pages(
            host,
            self._connector,
            prompts,
            self._ropes,
            options.policy,
            options.corrector,
            max_rows=self._max_rows,
            room=self._room,
            ring=self._ring,
            dense=self._dense,
            recorder=self._recorder,
            fp8=self._pages_now(),
            ahead=self._staged(group),
        )
        seconds = {**result.seconds, "total": time.perf_counter() - start}
        return {
            request.req_id: BlendReport(plan, budget, fallback, seconds)
            for request, plan, budget, fallback in zip(
                group, result.plans, result.charged_budgets, result.fallbacks, strict=True
            )
        }


def _paged_prompt(prepared: PreparedBlend, slots: torch.Tensor) -> PagedPrompt:
    return PagedPrompt(
        num_tokens=len(prepared.token_ids),
        slots=slots,
        exact_tokens=prepared.exact_tokens,
        passages=prepared.passages,
        ratio=prepared.options.ratio,
    )


def report_of(prepared: PreparedBlend, report: BlendReport) -> dict[str, Any]:
    """``kv_transfer_params.lmcache.blend`` of a response; times in milliseconds."""
    options = prepared.options
    blended = report.fallback is None
    recomputed = report.recomputed if blended else []
    return {
        "prefix_tokens": prepared.exact_tokens,
        "segments": [
            {
                "start": passage.start,
                "end": passage.end,
                "old_start": passage.old_start,
                "tokens_by_tier": passage.tokens_by_tier,
            }
            for passage in prepared.passages
            if blended
        ],
        "recomputed": recomputed,
        "recomputed_tokens": sum(end - start for start, end in recomputed),
        "policy": options.policy.name,
        "corrector": options.corrector.name,
        "ratio": options.ratio,
        "charged_budget": round(report.charged_budget, 4),
        "milliseconds": {phase: round(1e3 * seconds, 3) for phase, seconds in report.seconds.items()},
        "fallback": report.fallback,
    }
