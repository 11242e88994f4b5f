"""``LMCBlender``: CacheBlend over an engine's pages, for integrations that call it themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch

from lmcache.blend.find_passages import PassageFinder
from lmcache.blend.from_config import make_corrector_from_config, make_policy_from_config, recompute_ratio
from lmcache.blend.host import BlendHost
from lmcache.blend.layerwise import LayerwiseBlend
from lmcache.blend.paged_blend import PagedPrompt, blend_pages
from lmcache.blend.rope import FusedRope
from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.keys import token_array
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.paging.paged_connector import PagedConnector
from lmcache.prompt import leading_false
from lmcache.segmentation.known_passages import KnownChunk, KnownPassages
from lmcache.segmentation.token_text import Tokenizer

MakeHost: TypeAlias = Callable[[Sequence[torch.Tensor]], BlendHost[Any]]
"""Gives a host over prompts (int64 ``[N_i]`` each, on the CPU)."""


@dataclass(frozen=True)
class _Model:
    make_host: MakeHost
    ropes: Sequence[FusedRope | None]


class LMCBlender:
    """The library's blend, between an engine's cache and its pages.

    Prompts are learned with :meth:`store`; :meth:`blend` then finds their passages in others. Needs no model until the
    first blend: :meth:`register_model` brings it.
    """

    def __init__(
        self,
        cache_engine: LMCacheEngine,
        gpu_connector: GPUConnectorInterface,
        config: LMCacheEngineConfig,
        *,
        passages: KnownPassages | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Args:
            passages: what is known already (a manager's); None: nothing so far.
            tokenizer: needed where ``blend_segmentation`` is "separator".

        Raises:
            ValueError: the connector's pages cannot be read token by token, or the configuration cannot work.
        """
        if not isinstance(gpu_connector, PagedConnector) or gpu_connector.kv_layout.packed:
            raise ValueError(
                f"{type(gpu_connector).__name__}: pages whose single tokens cannot be read are not blended"
            )
        self._engine = cache_engine
        self._connector = gpu_connector
        self._config = config
        # Not "or": one that is still empty is false.
        self._known = KnownPassages(config.chunk_size, cache_engine.storage.contains) if passages is None else passages
        self._finder = PassageFinder(cache_engine, self._known, config, tokenizer)
        self._policy = make_policy_from_config(config)
        self._corrector = make_corrector_from_config(config)
        self._model: _Model | None = None
        self._layerwise: LayerwiseBlend | None = None

    def register_model(self, make_host: MakeHost, ropes: Sequence[FusedRope | None]) -> None:
        """Say how the model is run, and how its keys are rotated: one rope a layer, None where they are not."""
        self._model = _Model(make_host, ropes)

    def store(self, tokens: Sequence[int] | torch.Tensor, *, slot_mapping: torch.Tensor) -> int:
        """Keep the KV of an exactly computed prompt and remember its text; returns how many tokens are newly kept."""
        stored = self._engine.store(tokens, slot_mapping=slot_mapping)
        keys, size, array = self._engine.prefix_keys(tokens, paged=True), self._config.chunk_size, token_array(tokens)
        self._known.add_prompt(
            [KnownChunk(key, array[at * size : (at + 1) * size], at * size) for at, key in enumerate(keys)]
        )
        return stored

    def blend(self, tokens: Sequence[int] | torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Fill the pages with the KV of ``tokens``: the exact prefix, what is known, moved, and the rest.

        Args:
            tokens: the whole prompt, ``T`` tokens.
            mask: bool ``[T]``, False for leading tokens that the pages hold already.
            kwargs: ``slot_mapping`` (int64 ``[T]``, required), ``ratio`` (else the configuration's).

        Raises:
            ValueError: there is no model yet, or an argument is missing, unknown or of another shape.
        """
        model = self._registered()
        ratio = kwargs.pop("ratio", None)
        with self._planned(tokens, mask, ratio, kwargs) as prompt:
            host = model.make_host([torch.as_tensor(tokens, dtype=torch.int64).cpu()])
            blend_pages(host, self._connector, [prompt], model.ropes, self._policy, self._corrector)

    def blend_layer(
        self, tokens: Sequence[int] | torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Generator[int, None, None]:
        """:meth:`blend` by a caller that runs the layers itself: yields 0, 1, … for each to be run.

        Within a step the caller computes the layer for the tokens :attr:`rows` and calls :meth:`process_qkv` before its
        attention. The policy is always ``kv_deviation``. After the last step the pages are filled. Arguments and errors
        as in :meth:`blend`, without ``ratio``.
        """
        model = self._registered()
        if len(model.ropes) != self._connector.num_layers:
            raise ValueError(f"ropes: expected one for each of {self._connector.num_layers} layers")
        if self._layerwise is not None:
            raise ValueError("another prompt is being blended layer by layer: finish it, or close its generator, first")
        with self._planned(tokens, mask, None, kwargs) as prompt:
            index = self._connector.token_index(prompt.slots[prompt.exact_tokens :])

            def write(layer_id: int, keys: torch.Tensor, values: torch.Tensor) -> None:
                rows = slice(prompt.exact_tokens, len(prompt.slots))
                self._connector.write_tokens(layer_id, index, (keys[rows], values[rows]))

            planned = prompt.planned(self._connector)
            self._layerwise = layers = LayerwiseBlend(planned, model.ropes, self._corrector, self._config, write)
            try:
                for layer_id in range(len(model.ropes)):
                    yield layer_id
                    if layers.next_layer != layer_id + 1:
                        raise ValueError(f"layer {layer_id}: its step ended without a call of process_qkv")
            finally:
                self._layerwise = None

    @property
    def rows(self) -> torch.Tensor:
        """int64, ascending: the positions of the tokens that the next layer computes."""
        return self._in_layers().rows

    def process_qkv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        residual: torch.Tensor | None,
        layer_id: int,
        attn_output: torch.Tensor | None,
        attn_metadata: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, Any]:
        """Between the projections of a layer and its attention.

        At a check layer the tokens that go on are chosen: by how much V changed, as many as the layer's ratio says, at
        least one, and all that must be. What belongs to the others is cut from q, residual and ``attn_output``, and
        ``attn_metadata.positions`` is set if it has that.

        Args:
            q: ``[n, …]`` of the tokens :attr:`rows`, rotated; ``residual`` and ``attn_output`` likewise, or None.
            k: ``[n, kv_heads, dim]`` or ``[n, kv_heads · dim]``, rotated; ``v`` likewise.

        Returns:
            ``(q, k, v, residual, attn_output, attn_metadata)`` with k and v of the whole prompt ``[T, …]``: moved,
            corrected, and fresh where computed. The pages hold them already.

        Raises:
            ValueError: called outside of a step of :meth:`blend_layer`, for another layer or another number of tokens.
        """
        return self._in_layers().process_qkv(q, k, v, residual, layer_id, attn_output, attn_metadata)

    @contextmanager
    def _planned(
        self,
        tokens: Sequence[int] | torch.Tensor,
        mask: torch.Tensor | None,
        ratio: float | None,
        kwargs: dict[str, Any],
    ) -> Generator[PagedPrompt, None, None]:
        """The prompt with its exact prefix in the pages and what is known of the rest, held until the block is left."""
        slots = kwargs.pop("slot_mapping", None)
        if slots is None or kwargs:
            what = f"{', '.join(kwargs)}: unknown" if slots is not None else "slot_mapping: missing"
            raise ValueError(f"{what}; blend takes slot_mapping (int64 [T]), and ratio")
        if len(tokens) == 0:
            raise ValueError("tokens: a prompt has at least one")
        if not isinstance(slots, torch.Tensor) or bool((slots < 0).any()):
            raise ValueError(
                "slot_mapping: expected an int64 tensor [T] without negative slots, every token is written"
            )
        slots = slots.cpu()
        found = self._engine.retrieve(tokens, mask, slot_mapping=slots)
        # The last token is always computed, so that there is something to go on from.
        exact = min(max(leading_false(mask, len(tokens)), _end(found)), len(tokens) - 1)
        listed = [int(token) for token in tokens]
        namespace = self._engine.namespace(paged=True)
        passages = self._finder.find(listed, exact, self._finder.ranges(listed, None), namespace)
        try:
            passages.lease.wait(self._config.max_disk_wait_seconds)
            passages.lease.cut()
            held = passages.held(exact, len(listed) - 1, self._config.blend_min_tokens)
            share = recompute_ratio(self._config) if ratio is None else ratio
            yield PagedPrompt(len(listed), slots, exact, held, share)
            if self._connector.tensors[0].is_cuda:
                torch.cuda.synchronize()  # host memory may be reused once the lease is gone
        finally:
            passages.lease.release()

    def _registered(self) -> _Model:
        if self._model is None:
            raise ValueError("there is no model to blend with: call register_model(make_host, ropes) first")
        return self._model

    def _in_layers(self) -> LayerwiseBlend:
        if self._layerwise is None:
            raise ValueError("no prompt is being blended: call this within a step of blend_layer")
        return self._layerwise


def _end(found: torch.Tensor) -> int:
    places = torch.nonzero(found)
    return int(places[-1]) + 1 if len(places) else 0


class LMCBlenderBuilder:
    """The blenders of this process, by the name of their engine. Thread-safe."""

    _built: ClassVar[dict[str, tuple[LMCBlender, tuple[object, ...]]]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def get_or_create(
        cls,
        instance_id: str,
        cache_engine: LMCacheEngine,
        gpu_connector: GPUConnectorInterface,
        config: LMCacheEngineConfig,
        *,
        passages: KnownPassages | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> LMCBlender:
        """The blender of that name, made on the first call. ``passages`` and ``tokenizer`` as for :class:`LMCBlender`.

        Raises:
            ValueError: it exists and was made with other arguments; or what :class:`LMCBlender` raises.
        """
        arguments = (cache_engine, gpu_connector, config.model_dump(), passages, tokenizer)
        with cls._lock:
            if instance_id not in cls._built:
                cls._built[instance_id] = (
                    LMCBlender(cache_engine, gpu_connector, config, passages=passages, tokenizer=tokenizer),
                    arguments,
                )
            blender, made_with = cls._built[instance_id]
        names = ("cache engine", "connector", "configuration", "passages", "tokenizer")
        differing = [name for name, a, b in zip(names, made_with, arguments, strict=True) if a is not b and a != b]
        if differing:
            raise ValueError(
                f"blender {instance_id!r} exists and was made with another {' and '.join(differing)}; destroy it "
                "first, or use another instance id"
            )
        return blender

    @classmethod
    def get(cls, instance_id: str) -> LMCBlender | None:
        """The blender of that name, if there is one."""
        with cls._lock:
            built = cls._built.get(instance_id)
        return None if built is None else built[0]

    @classmethod
    def destroy(cls, instance_id: str) -> None:
        """Forget the blender of that name; without one, nothing happens."""
        with cls._lock:
            cls._built.pop(instance_id, None)
