"""SGLang's pool objects: which of them hold KV that can be kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lmcache.integration.sglang.shared_engine import UnsupportedSetupError


class Pools(NamedTuple):
    """One tensor ``[slots, heads, dim]`` a layer; ``values`` is None for MLA. ``dtype`` is that of the KV, which 8-bit
    pools hold as uint8."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor] | None
    dtype: torch.dtype


def refuse_other_components(
    tree_components: Sequence[Any], mamba_component: Any, sliding_window_size: int | None
) -> None:
    """Raises:
    UnsupportedSetupError: the model keeps more than the KV of full attention: slots that slide out of a window are
        given up in mid-request, and recurrent state is no KV of single tokens.
    """
    others = [str(getattr(part, "value", part)) for part in tree_components if "full" not in str(part).lower()]
    if others or mamba_component is not None or sliding_window_size is not None:
        raise UnsupportedSetupError(
            f"--enable-lmcache: this model's cache also has {', '.join(others) or 'a sliding window or state'}; only "
            "models with full attention in every layer are supported so far. Start SGLang without --enable-lmcache"
        )


def pools_of(kvcache: Any) -> Pools:
    """The tensors of SGLang's ``KVCache``.

    Raises:
        UnsupportedSetupError: it is of a kind whose bytes are not plain K and V.
    """
    kind = type(kvcache).__name__
    if getattr(kvcache, "k_scale_buffer", None) is not None or "FP4" in kind:
        raise UnsupportedSetupError(f"{kind}: quantised KV with scales of its own cannot be kept so far")
    if (keys := getattr(kvcache, "k_buffer", None)) is not None:
        return Pools(list(keys), list(kvcache.v_buffer), kvcache.dtype)
    indexed = getattr(kvcache, "index_k_with_scale_buffer", None) is not None
    if not indexed and (latent := getattr(kvcache, "kv_buffer", None)) is not None:
        return Pools(list(latent), None, kvcache.dtype)
    raise UnsupportedSetupError(f"{kind}: KV of this kind cannot be kept so far")
