"""KV that is on its way before its blend begins: while an engine still prepares the step that will run it."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.blend.batch import BlendBatch, BlendPrompt, PlacedSpan
from lmcache.blend.staged_layers import StagedLayers, StagingRing
from lmcache.paging.layout import KVLayout

# Behind these bytes stands in line what the request loads itself, the prefix in front of its blend, without which no
# layer can begin. It is queued 1.9 ms later for 4,096 tokens, 2.4 for 8,192 and 3.0 for 16,384 (beside an H200): as
# long as these bytes take at 54 GB/s.
_AHEAD_BYTES, _AHEAD_BYTES_A_TOKEN = 96 * 2**20, 5 * 2**10


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
