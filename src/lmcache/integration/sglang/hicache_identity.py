"""What keeps HiCache pages of two models, shards or arrangements apart: SGLang's hashes name nothing but tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache.config import LMCacheEngineConfig
from lmcache.integration.config_digest import config_digest
from lmcache.integration.model_identity import fingerprint
from lmcache.integration.sglang import server_settings
from lmcache.keys import Namespace

_FIELDS_OF_KV = ("dtype", "kv_cache_dtype", "quantization", "revision", "json_model_override_args", "load_format")


def page_namespace(storage_config: Any, pool: Any) -> Namespace:
    """The namespace of pages of ``pool``, SGLang's host pool, in the rank that ``storage_config`` describes."""
    name = str(storage_config.model_name or "")
    path = Path(name)
    local = bool(name) and path.exists()
    arrangement = (
        type(pool).__name__,
        pool.layout,
        pool.page_size,
        pool.get_dummy_flat_data_page().numel(),
        getattr(pool, "storage_format_tag", None),
    )
    replicated = bool(storage_config.is_mla_model)
    return Namespace(
        model=path.name if local else name,
        kv_dtype=str(pool.dtype).removeprefix("torch."),
        layout=":".join(map(str, arrangement)),
        revision=fingerprint(path) if local else "",
        model_config=config_digest(
            {
                **server_settings.chosen(_FIELDS_OF_KV),
                "cp": [storage_config.attn_cp_rank, storage_config.attn_cp_size],
                "split_heads": [storage_config.should_split_heads, storage_config.tp_lcm_size],
            }
        ),
        tp_rank=0 if replicated else storage_config.tp_rank,
        tp_size=1 if replicated else storage_config.tp_size,
        pp_rank=storage_config.pp_rank,
        pp_size=storage_config.pp_size,
    )


def rank_directory(config: LMCacheEngineConfig, storage_config: Any) -> LMCacheEngineConfig:
    """``config`` with a disk directory of this rank's own: each process needs one."""
    ranks = {
        name: getattr(storage_config, f"{name}_rank", 0)
        for name in ("tp", "pp", "attn_cp", "dp")
        if getattr(storage_config, f"{name}_size", 1) > 1 or getattr(storage_config, f"{name}_rank", 0)
    }
    if config.local_disk is None or not ranks:
        return config
    folder = config.local_disk / "-".join(f"{name}{rank}" for name, rank in ranks.items())
    return config.model_copy(update={"local_disk": folder})
