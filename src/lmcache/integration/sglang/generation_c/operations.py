"""What SGLang carries from call to call: a look-up, a load, a store."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmcache.lease import PrefixLease


@dataclass
class Lookup:
    """A prompt of which we hold what we have, until it is loaded or given up.

    ``hit_tokens`` is None until every rank knows. Reads from disk are waited for until ``deadline``, and all is held
    until ``hold_until`` at most, both of ``time.monotonic``. ``lock_start`` is SGLang's: where its claim begins.
    ``flow`` is what SGLang keeps of the request, ``wanted`` what CacheBlend does, once it is
    ``planned``. With ``exact`` off, the request has been blended before.
    """

    request_id: str
    token_ids: npt.NDArray[np.int64]
    cache_salt: str
    deadline: float
    exact: bool = True
    hold_until: float = float("inf")
    flow: Any = None
    planned: bool = False
    wanted: Any = None
    lease: PrefixLease | None = None
    hit_tokens: int | None = None
    lock_start: int = 0

    def release(self) -> None:
        """Idempotent."""
        lease, self.lease = self.lease, None
        wanted, self.wanted = self.wanted, None
        for held in (lease, wanted):
            if held is not None:
                held.release()


@dataclass
class Load:
    """KV on its way into the slots ``device_indices`` of the tokens behind ``local_hit_tokens``.

    ``future`` gives whether all of it is in place, once the device is done; ``result`` is what the ranks agreed on.
    ``issued`` is set when everything is queued on the device, ``on_device`` is then the event behind it, if there is a
    queue.
    """

    request_id: str
    local_hit_tokens: int
    device_indices: torch.Tensor
    future: Future[bool] = field(default_factory=Future)
    issued: threading.Event = field(default_factory=threading.Event)
    all_found: bool = False
    on_device: Any = None
    result: bool | None = None

    def fail(self) -> None:
        """Nothing was loaded, and nothing will be."""
        self.all_found = False
        self.issued.set()
        if not self.future.done():
            self.future.set_result(False)


@dataclass
class Store:
    """KV on its way out of the pools; SGLang leaves the slots alone until ``future`` is done."""

    request_id: str
    future: Future[int]
