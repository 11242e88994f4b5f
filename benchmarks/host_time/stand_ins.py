"""What takes the place of a GPU: kernels, streams and copies that do nothing, so that what is left is the host's time.

Chunks keep their number and their layers but have a hundred and twenty-eighth of the bytes; the staging buffers, which
decide how many copies there are, are as much smaller.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from lmcache.blend import staged_layers
from lmcache.integration.vllm.blend import blender, host
from lmcache.paging import staged_connector

LAYERS, HEADS, DIM = 32, 1, 8
_SMALLER = 128  # than 8 heads of 128 elements
STAGING_BYTES = 576 * 2**20 // _SMALLER


class _Stream:
    cuda_stream = 0

    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *, blocking: bool = False) -> None: ...

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


class FirstCopy:
    """When the first copy to the device was queued."""

    def __init__(self) -> None:
        self.at: float | None = None

    def queue(self, *_: object) -> None:
        if self.at is None:
            self.at = time.perf_counter()


def _nothing(*_: object, **__: object) -> None: ...


def _read(_: object, rows: torch.Tensor, *__: object) -> tuple[torch.Tensor, torch.Tensor]:
    nothing = torch.zeros(len(rows), HEADS, DIM, dtype=torch.bfloat16)
    return nothing, nothing


@dataclass(frozen=True)
class _Turns:
    cos: torch.Tensor
    sin: torch.Tensor
    of_row: torch.Tensor
    is_neox_style: bool


def install() -> FirstCopy:
    """For the rest of the process."""
    first = FirstCopy()
    scores = torch.rand(1, 1 << 16)
    kernels: dict[str, dict[str, Any]] = {
        "kv_write": {"place": _nothing, "write": _nothing, "Turns": _Turns},
        "kv_read": {"read": _read, "read_among": _read, "deviation": _nothing},
        "sparse_attention": {"sparse_attention": lambda q, *_, **__: (q, None), "SeenByAll": SimpleNamespace},
        "attention_received": {"attention_received": lambda q, kv, *_, **__: scores[:, : len(kv.offsets)]},
        "chunk_copy": {"copy_chunks": _nothing, "PageAddresses": SimpleNamespace},
        "chunks_to_host": {"copy_to_host": _nothing},
    }
    for name, members in kernels.items():
        module = ModuleType(f"lmcache.kernels.{name}")
        vars(module).update(members)
        sys.modules[module.__name__] = module
    for owner, name, value in (
        (torch.cuda, "Event", _Event),
        (torch.cuda, "current_stream", lambda *_: _Stream()),
        (staged_layers, "can_copy_many", lambda _: True),
        (staged_layers, "copy_many", first.queue),
        (staged_connector, "can_copy_many", lambda _: True),
        (staged_connector, "copy_many", first.queue),
        (staged_connector, "_GROUP_BYTES", (64 << 20) // _SMALLER),
        (staged_connector, "_SAVE_BYTES", (64 << 20) // _SMALLER),
        (blender, "can_blend_in_pages", lambda *_: True),
        (blender, "flash_attention", lambda _: None),
        (host, "get_tp_group", lambda: SimpleNamespace(world_size=1)),
    ):
        setattr(owner, name, value)
    return first


def stand_in_stream(ring: Any) -> None:
    """``ring`` queues its copies on a stream that is none. It has its memory already: torch would ask the stream."""
    ring.stream = _Stream()


class Model:
    """Calls the blend's attention in every layer, as a model does; it computes nothing itself."""

    def __init__(self) -> None:
        self.layers = dict.fromkeys(range(LAYERS), SimpleNamespace(impl=None))

    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        fresh = torch.zeros(len(input_ids), HEADS, DIM, dtype=torch.bfloat16)
        for layer in range(LAYERS):
            attend(layer, fresh, fresh, fresh, scale=1.0)
        return fresh[:, 0]
