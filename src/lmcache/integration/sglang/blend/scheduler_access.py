"""SGLang's scheduler, as far as CacheBlend needs it: SGLang hands a connector neither its model nor its requests."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch


class SchedulerAccess:
    """Reads what a scheduler says of itself. In another version it may be missing, which raises AttributeError."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    @classmethod
    def of_caller(cls) -> SchedulerAccess | None:
        """The scheduler that is building a connector at this moment, somewhere up the stack."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            caller: Any = frame.f_locals.get("self")
            if hasattr(caller, "tp_worker") and hasattr(caller, "server_args"):
                return cls(caller)
            frame = frame.f_back
        return None

    @property
    def model_runner(self) -> Any:
        return self._scheduler.tp_worker.model_runner

    @property
    def forward_stream(self) -> Any:
        """That on which SGLang's forwards run; None if it does not say."""
        return getattr(self._scheduler, "forward_stream", None)

    @property
    def tree_cache(self) -> Any:
        return self._scheduler.tree_cache

    @property
    def tokenizer(self) -> Any:
        return getattr(self._scheduler, "tokenizer", None)

    def waiting(self, request_id: str) -> Any:
        """SGLang's ``Req`` while it is queued; None if it is not."""
        return next((req for req in self._waiting() if req.rid == request_id), None)

    def custom_params(self, req: Any) -> Mapping[str, Any]:
        """What a request says to us."""
        params = getattr(req.sampling_params, "custom_params", None)
        return params if isinstance(params, Mapping) else {}

    def wants_whole_prompt(self, req: Any) -> bool:
        """Whether it asks for log-probabilities of tokens of its prompt, for which each must be computed."""
        start = getattr(req, "logprob_start_len", -1)
        return bool(getattr(req, "return_logprob", False)) and 0 <= start < len(req.origin_input_ids) - 1

    def has_computed_prompt(self, req: Any) -> bool:
        """Whether the KV of all of its prompt is in its slots; on a device, once that is done with its forwards."""
        return len(req.output_ids) > 0 or int(req.kv.kv_committed_len) >= len(req.origin_input_ids)

    def wait_for_forwards(self) -> None:
        stream = self.forward_stream
        if hasattr(stream, "synchronize"):
            stream.synchronize()

    def slots(self, req: Any, num_tokens: int) -> torch.Tensor:
        """int64 ``[num_tokens]`` on the CPU: where the KV of its first tokens is."""
        table = self._scheduler.req_to_token_pool.req_to_token
        slots: torch.Tensor = table[req.kv.req_pool_idx, :num_tokens].to("cpu", torch.int64)
        return slots

    def _waiting(self) -> Iterator[Any]:
        return iter(self._scheduler.waiting_queue)
