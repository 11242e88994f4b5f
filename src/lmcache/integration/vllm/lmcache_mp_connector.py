"""What vLLM's ``LMCacheMPConnector`` and ``--kv-offloading-backend lmcache`` look for: an engine on a server.

::

    --kv-offloading-size 1 --kv-offloading-backend lmcache
    --kv-transfer-config '{"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}'

It is :class:`LMCacheConnectorV1Dynamic` with ``server_socket`` set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.config import LMCacheEngineConfig
from lmcache.integration.vllm.lmcache_connector_v1 import LMCacheConnectorV1Dynamic
from lmcache.server.address import socket_for

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig


class LMCacheMPConnector(LMCacheConnectorV1Dynamic):
    """The socket is ``server_socket`` where that is configured; else what ``lmcache.mp.host`` and ``lmcache.mp.port``
    say, see :func:`lmcache.server.address.socket_for`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        if LMCacheEngineConfig.load(engine_overrides=extra).server_socket is None:
            extra["lmcache.server_socket"] = str(socket_for(extra.get("lmcache.mp.host"), extra.get("lmcache.mp.port")))
        super().__init__(vllm_config, role, kv_cache_config)
