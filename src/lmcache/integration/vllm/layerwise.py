"""Loads that arrive layer by layer while the forward runs (``use_layerwise``)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lmcache.integration.vllm.connector_metadata import LoadOp
from lmcache.lease import PrefixLease

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext


def calls_layer_hooks(context: ForwardContext | None) -> bool:
    """Whether the forward of ``context`` asks for each layer: a full CUDA graph is replayed without, and a step that
    computes nothing has none."""
    from vllm.config import CUDAGraphMode

    if context is None or context.attn_metadata is None:
        return False
    return bool(context.cudagraph_runtime_mode != CUDAGraphMode.FULL)


@dataclass
class _Load:
    op: LoadOp
    lease: PrefixLease
    steps: Generator[object, None, torch.Tensor]
    layers_done: int = 0


class LayerwiseLoads:
    """The loads of one step, advanced by vLLM's per-layer hook.

    A load that fails, or whose hooks never came against :func:`calls_layer_hooks`, goes to ``on_failure``: the forward
    has then run on pages that were not filled, and vLLM must compute those blocks again.
    """

    def __init__(self, on_failure: Callable[[LoadOp, Exception], None]) -> None:
        self._on_failure = on_failure
        self._layer_index: dict[str, int] = {}
        self._loads: list[_Load] = []

    def set_layers(self, names: list[str]) -> None:
        self._layer_index = {name: index for index, name in enumerate(names)}

    @property
    def under_way(self) -> bool:
        return bool(self._loads)

    def start(self, op: LoadOp, lease: PrefixLease, steps: Generator[object, None, torch.Tensor]) -> None:
        """Take over ``lease`` until the load has ended."""
        self._loads.append(_Load(op, lease, steps))

    def advance_to(self, layer_name: str) -> None:
        """Return once ``layer_name`` of every load is in place."""
        target = self._layer_index[layer_name] + 1
        self._loads = [load for load in self._loads if self._advanced(load, target)]

    def finish(self) -> None:
        """End the step."""
        loads, self._loads = self._loads, []
        for load in loads:
            load.steps.close()
            load.lease.release()
            if load.layers_done < len(self._layer_index):
                self._on_failure(
                    load.op,
                    RuntimeError(
                        f"vLLM asked for {load.layers_done} of {len(self._layer_index)} layers during the forward; "
                        "turn use_layerwise off or run with --enforce-eager"
                    ),
                )

    def _advanced(self, load: _Load, target: int) -> bool:
        try:
            while load.layers_done < target:
                next(load.steps)
                load.layers_done += 1
        except Exception as error:
            load.lease.release()
            self._on_failure(load.op, error)
            return False
        return True
