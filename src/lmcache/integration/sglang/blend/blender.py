"""Fills SGLang's slots with the blended KV of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmcache.blend.blend_pass import BlendResult
from lmcache.blend.coverage import holes
from lmcache.blend.layer_room import LayerRoom
from lmcache.blend.paged_blend import PagedPrompt, blend_pages
from lmcache.blend.passage_lease import HeldPassage, PassageLease
from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.blend.options import BlendOptions
from lmcache.integration.blend.ropes import find_ropes
from lmcache.integration.sglang.blend.host import SGLangHost, SGLangModel
from lmcache.memory.int_tensor import int_tensor
from lmcache.paging.paged_connector import PagedConnector


@dataclass
class PreparedBlend:
    """A promise to SGLang: all tokens of the prompt that it wants loaded. The first ``exact_tokens`` are no business of
    the blend's."""

    token_ids: list[int]
    exact_tokens: int
    passages: list[HeldPassage]
    lease: PassageLease
    options: BlendOptions

    def holes(self, end: int) -> list[tuple[int, int]]:
        """What of the first ``end`` tokens is computed anew."""
        return holes(self.passages, self.exact_tokens, end)


class Blender:
    """One for a model and its pools."""

    def __init__(self, model_runner: Any, connector: PagedConnector, groups: Sequence[Any] = ()) -> None:
        """``groups``: of the ranks that hold the model together; each runs every blend.

        Raises:
            UnsupportedModelError: the model cannot be blended.
        """
        self._groups = groups
        self._model = SGLangModel(model_runner)
        if len(self._model.layers) != connector.num_layers:
            raise UnsupportedModelError(self._model.model, "not every layer has a pool of its own")
        computed, kept = model_runner.dtype, connector.kv_layout.dtype
        if computed != kept:
            raise UnsupportedModelError(self._model.model, f"it computes in {computed} and keeps its KV as {kept}")
        self._connector = connector
        self._ropes = find_ropes(self._model)
        self._max_rows = int(model_runner.server_args.chunked_prefill_size or 0) or None
        self._room = LayerRoom()

    @torch.inference_mode()
    def run(self, prepared: PreparedBlend, slots: torch.Tensor) -> BlendResult[None]:
        """Write all of ``slots`` (int64 ``[n]`` on the CPU, of the first tokens) but those of the exact tokens, which
        hold their KV already."""
        prompt = PagedPrompt(
            num_tokens=len(prepared.token_ids),
            slots=slots,
            exact_tokens=prepared.exact_tokens,
            passages=prepared.passages,
            ratio=prepared.options.ratio,
        )
        return blend_pages(
            SGLangHost(self._model, [int_tensor(prepared.token_ids)], self._groups),
            self._connector,
            [prompt],
            self._ropes,
            prepared.options.policy,
            prepared.options.corrector,
            max_rows=self._max_rows,
            room=self._room,
        )

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """The KV of the slots ``source`` into ``target`` (int64 ``[n]`` each, on the CPU), in every layer."""
        read, write = self._connector.token_index(source), self._connector.token_index(target)
        for layer in range(self._connector.num_layers):
            self._connector.write_tokens(layer, write, self._connector.read_tokens(layer, read))
