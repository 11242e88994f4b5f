"""A connector that caches nothing: it runs what a test wants to run inside a step of vLLM, in the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from lmcache.integration.vllm.blend.model_finder import find_model

CONFIG = {
    "kv_connector": "StepConnector",
    "kv_connector_module_path": "tests.vllm.blend.step_connector",
    "kv_role": "kv_both",
}


class StepConnector(KVConnectorBase_V1):
    """``job``, if there is one, runs in the next step's ``start_load_kv``; ``model`` was found as ours will find it."""

    job: Callable[[], None] | None = None
    model: Any = None

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        layers = self._vllm_config.compilation_config.static_forward_context
        type(self).model = find_model(layers[next(iter(kv_caches))])

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        job, type(self).job = type(self).job, None
        if job is not None:
            job()

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()
