"""A blend that the scheduler role has planned in its process, made ready in a rank's."""

from __future__ import annotations

from lmcache.integration.blend.options import BlendDefaults
from lmcache.integration.vllm.blend.scheduling import PreparedBlend
from lmcache.integration.vllm.connector_metadata import BlendOp
from lmcache.integration.vllm.shared_engine import SharedEngine


def take_blend(shared: SharedEngine, defaults: BlendDefaults | None, op: BlendOp) -> PreparedBlend:
    """Where both roles share a process, it is ready there.

    Raises:
        LookupError: what was promised is not held any more.
        ValueError: part of it is not held, or the request's options cannot be used.
    """
    if op.planned is None:
        return shared.prepared_blends.pop(op.req_id)
    planned = op.planned
    assert defaults is not None
    lease = shared.held_passages.pop(planned.lease)
    try:
        passages = [lease.chosen(*place) for place in planned.passages]
        options = defaults.for_request(planned.params)
    except BaseException:
        lease.release()
        raise
    return PreparedBlend(planned.token_ids, op.exact_tokens, passages, lease, options)
