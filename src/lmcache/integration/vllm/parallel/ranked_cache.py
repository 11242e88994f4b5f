"""``RankedCache``: what the scheduler role needs of a :class:`SharedEngine`, where the ranks are other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmcache.blend.find_passages import PromptCutter
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.vllm.connector_metadata import BlendOp, LMCacheConnectorMetadata, PlannedBlend
from lmcache.integration.vllm.model_identity import engine_metadata
from lmcache.integration.vllm.parallel.failed_loads import FailedLoads
from lmcache.integration.vllm.parallel.planned_saves import PlannedSaves
from lmcache.integration.vllm.parallel.ranked_engine import RankedEngine
from lmcache.integration.vllm.parallel.ranked_lease import RankedLease
from lmcache.integration.vllm.parallel.ranked_passages import RankedFinder, RankedPassageLease
from lmcache.integration.vllm.parallel.ranks import Ranks
from lmcache.integration.vllm.parallel.rendezvous import socket_path
from lmcache.integration.vllm.prometheus import StatsTeller
from lmcache.integration.vllm.shared_engine import UnsupportedSetupError
from lmcache.lease import PrefixLease
from lmcache.observability.logging import configure_for_engine
from lmcache.observability.metrics import Metrics
from lmcache.segmentation.explicit import PARAMETER as SEGMENTS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from lmcache.integration.vllm.blend.scheduling import BlendScheduling, PreparedBlend


class RankedCache:
    """One per scheduler. Connected to the ranks when a request is first looked up."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Raises:
        ValueError: the configuration is wrong (names the key, the value and where it came from).
        UnsupportedSetupError: there is no directory for the sockets.
        """
        configure_for_engine()
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        self.config = LMCacheEngineConfig.load(engine_overrides=transfer.kv_connector_extra_config)
        self.metrics = Metrics()
        self.stats = StatsTeller(self.metrics)
        try:
            paths = [socket_path(str(transfer.engine_id), rank) for rank in range(parallel.world_size)]
        except OSError as error:
            raise UnsupportedSetupError(f"there is no place for the sockets of the ranks: {error}") from error
        self._ranks = Ranks(paths, self.metrics)
        self.engine = RankedEngine(self._ranks, self.config, engine_metadata(vllm_config, self.config.chunk_size))
        self.saves = PlannedSaves(self._ranks)
        self.failed_loads = FailedLoads(self._ranks)
        self.blend_scheduling: BlendScheduling | None = None
        self.blend_reports: dict[str, dict[str, Any]] = {}

    @property
    def serves(self) -> bool:
        """Whether every rank is there and can use its pages."""
        return bool(self.engine.descriptions())

    @property
    def blends(self) -> bool:
        """Whether every rank can blend its model."""
        described = self.engine.descriptions()
        return bool(described) and all(rank.blends for rank in described)

    def hand_over(self, req_id: str, lease: PrefixLease | RankedLease) -> str:
        """The ranks may load what ``lease`` holds; its name there."""
        assert isinstance(lease, RankedLease)
        self.failed_loads.watch(req_id)
        return lease.name

    def hand_over_blend(self, op: BlendOp, prepared: PreparedBlend, params: Mapping[str, Any]) -> BlendOp:
        """The ranks may do ``op``, for a request that came with ``params``; what to tell them."""
        assert isinstance(prepared.lease, RankedPassageLease)
        self.failed_loads.watch(op.req_id)
        planned = PlannedBlend(
            lease=prepared.lease.name,
            token_ids=prepared.token_ids,
            passages=[(passage.match, passage.start, passage.end) for passage in prepared.passages],
            params={key: value for key, value in params.items() if key.startswith("lmcache.") and key != SEGMENTS},
        )
        return replace(op, planned=planned)

    def send_ahead(self, lease: PrefixLease | RankedLease, start: int) -> None:
        """The ranks learn of it with the step."""

    def stage(self, prepared: PreparedBlend) -> None:
        """As :meth:`send_ahead`."""

    def begin_early(self, meta: LMCacheConnectorMetadata) -> None:
        """As :meth:`send_ahead`."""

    def make_finder(self, cutter: PromptCutter) -> RankedFinder:
        return RankedFinder(self._ranks, cutter)

    def planned(self, meta: LMCacheConnectorMetadata) -> None:
        """``meta`` is what the ranks are told about the next step."""
        self.saves.planned(meta, self.config.chunk_size)

    def settle(self, req_id: str) -> None:
        """``req_id`` has ended: learn what became of its loads and blends."""
        report = self.failed_loads.settle(req_id)
        if report is not None:
            self.blend_reports[req_id] = report

    def close(self) -> None:
        self._ranks.close()
