"""What a real vLLM has sent ahead of its loads: see :mod:`tests.vllm.harness`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lmcache.integration.vllm.connector_metadata import LMCacheConnectorMetadata
from lmcache.integration.vllm.early_start import EarlyStart
from lmcache.memory.memory_obj import MemoryObj
from lmcache.paging.paged_connector import PagedConnector
from tests.vllm.scenarios import (
    forget,
    leaked_references,
    one_by_one,
    prose_prompts,
    shared_engines,
    shut_down,
    start_llm,
)

Ranges = Sequence[tuple[int, int]]


class Staging:
    """Copies of what was sent ahead, which a load of the same chunks takes in their place, as on a GPU."""

    def __init__(self) -> None:
        self.objs: list[MemoryObj] = []
        self.copies: list[MemoryObj] = []
        self.spoils = False
        self.loads: list[str] = []
        self._load = PagedConnector.batched_to_gpu

    def send_ahead(self, _: PagedConnector, objs: Sequence[MemoryObj], ranges: Ranges) -> None:
        assert all(obj.spec.num_tokens == end - start for obj, (start, end) in zip(objs, ranges, strict=True))
        self.objs, self.copies = list(objs), []
        for obj in objs:
            memory = obj.padded_bytes.clone()
            if self.spoils:
                memory.random_(0, 64)
            self.copies.append(MemoryObj(obj.spec, memory, 0, lambda _: None))

    def load(
        self, connector: PagedConnector, objs: Sequence[MemoryObj], ranges: Ranges, slot_mapping: torch.Tensor
    ) -> None:
        sent = len(objs) == len(self.objs) and all(obj is each for obj, each in zip(objs, self.objs, strict=True))
        self.loads.append("sent ahead" if sent else "not sent")
        self._load(connector, self.copies if sent else objs, ranges, slot_mapping)
        self.objs, self.copies = [], []


def reloads(lengths: list[int]) -> dict[str, Any]:
    """Prompts cold, again, and again with other bytes in what was sent ahead.

    ``loads``: of each load, by kind, whether its chunks were those that had been sent ahead. ``begun_early``: of each
    step with loads.
    """
    staging = Staging()
    begun: list[bool] = []
    begins = EarlyStart.begins

    def noting(early: EarlyStart, meta: LMCacheConnectorMetadata, device: torch.device) -> bool:
        begun.append(begins(early, meta, device))
        return begun[-1]

    def send_ahead(connector: PagedConnector, objs: Sequence[MemoryObj], ranges: Ranges) -> None:
        staging.send_ahead(connector, objs, ranges)

    def load(connector: PagedConnector, *arguments: Any) -> None:
        staging.load(connector, *arguments)

    with (
        patch.object(PagedConnector, "send_ahead", send_ahead),
        patch.object(PagedConnector, "batched_to_gpu", load),
        patch.object(EarlyStart, "begins", noting),
    ):
        llm = start_llm("built-in")
        prompts = prose_prompts(llm, lengths)
        answers, loads = {}, {}
        for kind in ("cold", "again", "spoilt"):
            staging.loads, staging.spoils = [], kind == "spoilt"
            answers[kind] = one_by_one(llm, prompts)
            loads[kind] = staging.loads
            shared_engines()[0].saves.wait()
            assert forget(llm)
        leaks = leaked_references()
        shut_down(llm)
    return {"answers": answers, "loads": loads, "begun_early": begun, "leaks": leaks}


def main() -> None:
    name, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(globals()[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
