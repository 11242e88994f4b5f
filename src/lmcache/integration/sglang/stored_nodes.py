"""Tree nodes that SGLang has locked for stores which are done."""

from __future__ import annotations

import sys
import weakref
from typing import Any

_FRAMES = 8


class StoredNodes:
    """Unlocks them, as SGLang's own ``evict`` does.

    Around stores in its own process SGLang (0.5.12, say) locks the nodes of a finished request and unlocks them in its
    next eviction, for it takes stores to go on in the background. Ours are done when they return. And that eviction may
    never come: requests that fit into what is free, but for the tokens they may yet write, are not admitted while
    nothing may be evicted, and nobody evicts for them. With no request running, the server stands still for good.
    """

    def __init__(self, connector: object) -> None:
        self._connector = weakref.ref(connector)
        self._tree: weakref.ref[Any] | None = None

    def unlock(self) -> None:
        """To be called in a call of the tree's that may evict. Where a tree keeps no such nodes, nothing happens."""
        tree = self._found()
        if tree is None:
            return
        with tree._node_lock:
            for node in tree._in_flight_nodes:
                tree.dec_lock_ref(node)
            tree._in_flight_nodes.clear()

    def _found(self) -> Any:
        """The tree that has our connector; it is among the callers."""
        if self._tree is not None:
            return self._tree()
        frame = sys._getframe(1)
        for _ in range(_FRAMES):
            if frame.f_back is None:
                return None
            frame = frame.f_back
            caller = frame.f_locals.get("self")
            if (
                getattr(caller, "lmcache_connector", None) is self._connector()
                and hasattr(caller, "_in_flight_nodes")
                and hasattr(caller, "_node_lock")
            ):
                self._tree = weakref.ref(caller)
                return caller
        return None
