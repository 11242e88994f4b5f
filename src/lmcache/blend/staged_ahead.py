"""KV that is on its way before its blend begins: while an engine still prepares the step that will run it."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.blend.batch import BlendBatch, BlendPrompt, PlacedSpan
from lmcache.blend.staged_layers import StagedLayers, StagingRing
from lmcache.paging.layout import KVLayout

# What the engine itself sends to the device meanwhile stands in line behind it, and the blend begins 3.3 ms later for
# 4,096 tokens, 4.7 for 8,192, 5.5 for 16,384 (beside an H200): as long as these bytes take at 54 GB/s.
_AHEAD_BYTES, _AHEAD_BYTES_A_TOKEN = 128 * 2**20, 8 * 2**10


class StagedAhead:
    """Of one prompt. Nothing is read of it unless :meth:`take` gives it out, and its chunks may be let go before."""

    def __init__(self, prompt: BlendPrompt, num_layers: int, layout: KVLayout, ring: StagingRing) -> None:
        """Begins to copy; ``ring`` is nobody else's by now."""
        moved = [placed for placed in BlendBatch([prompt]).placed if not placed.span.exact]
        self._spans = [placed.span for placed in moved]
        self._staged: StagedLayers | None = stage(moved, num_layers, layout, ring)
        self._staged.begin(_AHEAD_BYTES + prompt.plan.num_tokens * _AHEAD_BYTES_A_TOKEN)

    def take(self, moved: Sequence[PlacedSpan]) -> StagedLayers | None:
        """The layers, once, where ``moved`` are the spans that were staged, of the same chunks."""
        staged, self._staged = self._staged, None
        return staged if self._spans == [placed.span for placed in moved] else None


def stage(moved: Sequence[PlacedSpan], num_layers: int, layout: KVLayout, ring: StagingRing) -> StagedLayers:
    return StagedLayers(moved, num_layers, (layout.num_heads, layout.head_dim), layout.dtype, ring)
