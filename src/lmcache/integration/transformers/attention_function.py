"""Our attention in transformers' attention-function registry, active only while a blend runs.

No mask function is registered under the name: transformers then builds no mask at all (``masking_utils``: "custom
attention without equivalent mask creation"). Which keys a row sees is decided in the blend.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface

from lmcache.blend.host import Attend
from lmcache.integration.transformers.supported import unsupported

NAME = "lmcache_blend"

_attend: ContextVar[Attend | None] = ContextVar("lmcache_attend", default=None)

# Keyword arguments that do not change what attention computes, given what the blend knows by itself.
_HARMLESS = frozenset({"cache_position", "output_router_logits", "position_embeddings", "position_ids", "use_cache"})


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention, as transformers calls it.

    Args:
        module: the attention layer; its ``layer_idx`` counts.
        query: ``[1, query_heads, n, dim]``, rotated; ``key`` ``[1, kv_heads, n, dim]``; ``value`` likewise.

    Returns:
        ``[1, n, query_heads, value_dim]``, and None for the weights.

    Raises:
        RuntimeError: no blend is running here.
        UnsupportedModelError: the layer asks for something that the blend does not know.
    """
    attend = _attend.get()
    if attend is None:
        raise RuntimeError(
            "this model is being blended in another thread, and cannot run by itself until that is done: let threads "
            "take turns, or give each its own model"
        )
    asked = {name for name, wanted in others.items() if wanted is not None and wanted is not False} - _HARMLESS
    if asked:
        raise unsupported(module, f"its attention takes {', '.join(sorted(asked))}")
    if attention_mask is not None:
        raise unsupported(module, "it makes an attention mask of its own")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise unsupported(module, "its attention is not causal")
    if dropout and module.training:
        raise unsupported(module, f"attention dropout {dropout} is on: call model.eval()")
    if len(query) != 1 or query.shape[2] != key.shape[2]:
        raise unsupported(
            module, f"{list(query.shape)} queries look at keys {list(key.shape)}: this is no self-attention"
        )
    if AttentionSwitch.replaced(module.config) == "sdpa":
        softcap = None  # transformers' sdpa leaves it out, and so will the decoding that follows the blend
    out = attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


AttentionInterface.register(NAME, attention)


class AttentionSwitch:
    """Switches one model to our attention and back.

    Every config that a module of the model reads is switched, and gets back what it said before. Configs may be shared
    by models, and blends may run in several threads: the first to come switches a config, the last to go restores it.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    # By id of a config: how many blends use it, and what it said before.
    _switched: ClassVar[dict[int, tuple[int, str | None]]] = {}

    def __init__(self, model: Any) -> None:
        read = [model.config, *(getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", ()))]
        read += [getattr(module, "config", None) for module in model.modules()]
        # Not by the setter of `_attn_implementation`: it reaches into sub-configs, which may differ from each other.
        self._configs = {id(c): c for c in read if hasattr(c, "_attn_implementation_internal")}.values()

    @classmethod
    def replaced(cls, config: Any) -> str | None:
        """What a config that is switched now said before."""
        return cls._switched[id(config)][1]

    @contextmanager
    def calling(self, attend: Attend) -> Iterator[None]:
        """Within it, and in this thread, the model's layers call ``attend``."""
        with self._lock:
            for config in self._configs:
                count, before = self._switched.get(id(config), (0, config._attn_implementation_internal))
                self._switched[id(config)] = count + 1, before
                config._attn_implementation_internal = NAME
        token = _attend.set(attend)
        try:
            yield
        finally:
            _attend.reset(token)
            with self._lock:
                for config in self._configs:
                    count, before = self._switched.pop(id(config))
                    if count > 1:
                        self._switched[id(config)] = count - 1, before
                    else:
                        config._attn_implementation_internal = before
