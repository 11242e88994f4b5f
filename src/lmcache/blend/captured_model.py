"""A model whose small forwards are replayed as CUDA graphs, cut at its attention layers.

Between two attention layers a model starts a dozen kernels. For some hundred rows the host takes longer to start them
than the GPU to run them; to replay ten as a graph takes it 8 µs (measured beside an H100). Attention itself, where
everything of a blend happens, stays outside the graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import torch

from lmcache.blend.graph_recorder import begin_capture, no_garbage_collection, recover_from_capture
from lmcache.blend.host import Attend, have_in_place
from lmcache.kernels.availability import kernels_for
from lmcache.observability.logging import init_logger

logger = init_logger(__name__)

RunModel: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Attend], torch.Tensor]
"""Takes ``input_ids`` (int32 ``[n]``) and ``positions`` (int64 ``[n]``) on the device; gives ``[n, hidden]``."""

SIZES = (
    *range(16, 129, 16),
    *range(160, 1025, 32),
    *range(1088, 2049, 64),
)
"""Rows of the forwards that are captured. Beyond the last the GPU takes longer than the host by itself."""

_TIMED_LAYERS = 8


class _Seam(NamedTuple):
    """Where the graph before an attention layer leaves ``q``, ``k`` and ``v``, and the one behind it expects the
    outcome."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attended: torch.Tensor


class _Seams:
    """The same memory for all layers and sizes: what attention does to it can be recorded as well."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._rooms: dict[tuple[object, ...], torch.Tensor] = {}
        self._seams: dict[tuple[object, ...], _Seam] = {}

    def between(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Seam:
        """For a layer with such ``q``, ``k`` and ``v``: the same one for all layers that are alike."""
        key = tuple((x.shape, x.dtype) for x in (q, k, v))
        if key not in self._seams:
            self._seams[key] = _Seam(
                q=self._room("q", q, q.shape[1], q.shape[2]),
                k=self._room("k", k, k.shape[1], k.shape[2]),
                v=self._room("v", v, v.shape[1], v.shape[2]),
                attended=self._room("attended", q, q.shape[1], v.shape[2]),
            )
        return self._seams[key]

    def fill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Seam:
        """:meth:`between`, with copies of ``q``, ``k`` and ``v`` in it."""
        seam = self.between(q, k, v)
        if not _copied_at_once((q, k, v), seam[:3]):
            for room, computed in zip(seam, (q, k, v), strict=False):
                room.copy_(computed)
        return seam

    def _room(self, name: str, like: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
        key = name, heads, dim, like.dtype
        if key not in self._rooms:
            self._rooms[key] = torch.zeros((self._most_rows, heads, dim), dtype=like.dtype, device=like.device)
        return self._rooms[key][: len(like)]


@dataclass
class _Layer:
    """An attention layer, and the graph before it."""

    graph: torch.cuda.CUDAGraph
    layer_id: int
    seam: _Seam
    options: dict[str, Any]


@dataclass
class _Forward:
    """All graphs of a forward of ``size`` rows."""

    size: int
    layers: list[_Layer] = field(default_factory=list)
    end: torch.cuda.CUDAGraph | None = None
    hidden: torch.Tensor | None = None


def worth_keeping(milliseconds: Mapping[int, float]) -> list[int]:
    """The sizes, ascending, than which no larger one is as fast, given what each takes. The next larger one of them is
    the fastest that has room for so many rows."""
    kept: list[int] = []
    fastest = float("inf")
    for size in sorted(milliseconds, reverse=True):
        if milliseconds[size] < fastest:
            kept.append(size)
            fastest = milliseconds[size]
    return kept[::-1]


class CapturedModel:
    """Forwards of up to ``sizes[-1]`` rows, each replayed at the next larger size; the rows that fill it up are noise
    that no other row sees. One at a time, on the current stream."""

    def __init__(self, run: RunModel, device: torch.device, sizes: Sequence[int] = SIZES) -> None:
        self._run = run
        self._device = device
        self._ids = torch.zeros(sizes[-1], dtype=torch.int32, device=device)
        self._positions = torch.zeros(sizes[-1], dtype=torch.int64, device=device)
        self._seams = _Seams(sizes[-1])
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        start, (free, _) = time.perf_counter(), torch.cuda.mem_get_info(device)
        try:
            # Memory that the largest has taken is enough for the others.
            captured = [self._capture(size) for size in sorted(sizes, reverse=True)]
        except Exception:
            recover_from_capture()
            raise
        self._forwards = captured[::-1]
        seconds, taken = time.perf_counter() - start, free - torch.cuda.mem_get_info(device)[0]
        logger.info(
            "CacheBlend replays forwards of up to %d rows as CUDA graphs (%.1f s, %.2f GiB)",
            sizes[-1],
            seconds,
            taken / 2**30,
        )

    @property
    def max_rows(self) -> int:
        return self._forwards[-1].size

    def keep_fastest(self) -> None:
        """Measure the forwards, and let those go than which a larger one is faster.

        For some numbers of rows a library of linear algebra chooses a kernel that is far from its best: with the
        weights of Llama-3.1-8B, 448 rows take an H200 0.44 ms a layer, and 512 take it 0.33.
        """
        milliseconds = {forward.size: self._layer_milliseconds(forward) for forward in self._forwards}
        kept = worth_keeping(milliseconds)
        self._forwards = [forward for forward in self._forwards if forward.size in kept]
        logger.debug("rows that are replayed: %s; milliseconds a layer: %s", kept, milliseconds)

    def _layer_milliseconds(self, forward: _Forward) -> float:
        """What the GPU does in a layer between two attentions: the median of the first few, of different weights."""
        done = []
        # From the start: a layer that is given what no layer before it has left might find numbers that it cannot take.
        for layer in forward.layers[: 1 + _TIMED_LAYERS]:
            layer.graph.replay()
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            done.append(event)
        done[-1].synchronize()
        took: list[float] = [before.elapsed_time(after) for before, after in pairwise(done)]
        return median(took or [float(forward.size)])

    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """``[n, hidden]``, overwritten by the next call, for ``input_ids`` ``[n]`` at ``positions`` ``[n]``, on any
        device, with ``n`` at most :attr:`max_rows`."""
        count = len(input_ids)
        forward = next(forward for forward in self._forwards if forward.size >= count)
        # Blocking, they would wait for all that was queued before.
        self._ids[:count].copy_(input_ids, non_blocking=True)
        self._positions[:count].copy_(positions, non_blocking=True)
        seam: _Seam | None = None
        for layer in forward.layers:
            layer.graph.replay()
            if layer.seam is not seam:
                seam = layer.seam
                q, k, v, attended = (x[:count] for x in seam)
            have_in_place(attend(layer.layer_id, q, k, v, **layer.options, out=attended), attended)
        assert forward.end is not None
        assert forward.hidden is not None
        forward.end.replay()
        return forward.hidden[:count]

    def _capture(self, size: int) -> _Forward:
        ids, positions = self._ids[:size], self._positions[:size]
        with no_garbage_collection(), torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            # What runs for the first time may not be captured: libraries choose and load their kernels then.
            self._run(ids, positions, self._pass_by)
            self._stream.synchronize()
            recorder = _Recorder(size, self._pool, self._seams)
            recorder.begin()
            try:
                hidden = self._run(ids, positions, recorder.attend)
            finally:
                graph = recorder.finish()
            found = recorder.forward
            found.end, found.hidden = graph, _unowned(hidden)
        return found

    def _pass_by(self, layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        # Kernels are compiled now.
        return self._seams.fill(q, k, v).attended


class _Recorder:
    """Cuts the capture of a forward at its attention layers."""

    def __init__(self, size: int, pool: Any, seams: _Seams) -> None:
        self.forward = _Forward(size)
        self._pool = pool
        self._seams = seams
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        begin_capture(graph, self._pool)
        self._graph = graph

    def finish(self) -> torch.cuda.CUDAGraph:
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.capture_end()
        return graph

    def attend(
        self,
        layer_id: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """See :class:`lmcache.blend.host.Attend`."""
        seam = self._seams.fill(q, k, v)
        self.forward.layers.append(_Layer(self.finish(), layer_id, seam, options))
        self.begin()
        return seam.attended


def _copied_at_once(heads: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> bool:
    if not kernels_for(heads[0].device):
        return False
    from lmcache.kernels.copy_heads import copy_heads

    return copy_heads(heads, to)


class _Memory:
    """Bytes on a GPU that belong to somebody else, as other libraries are told of them."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _unowned(x: torch.Tensor) -> torch.Tensor:
    """``x`` without keeping its memory from being given to what a later graph computes."""
    numel = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    raw = torch.as_tensor(_Memory(x.data_ptr(), numel * x.element_size()), device=x.device)
    return raw.view(x.dtype).as_strided(x.shape, x.stride())
