"""Names that vLLM's module ``lmcache_mp_connector`` imports."""

from __future__ import annotations

from typing import Any


def mla_enabled(model_config: Any) -> bool:
    """Whether a ``vllm.config.ModelConfig`` is of a model with multi-head latent attention."""
    return getattr(model_config, "use_mla", False) is True
