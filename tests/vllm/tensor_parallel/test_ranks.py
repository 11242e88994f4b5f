"""The talk between a scheduler and its ranks, over real sockets, without a vLLM."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import torch

pytest.importorskip("vllm", reason="the adapter imports vLLM")

from lmcache.integration.vllm.connector_metadata import LMCacheConnectorMetadata, SaveOp
from lmcache.integration.vllm.parallel import ranks as ranks_module
from lmcache.integration.vllm.parallel.failed_loads import FailedLoads
from lmcache.integration.vllm.parallel.messages import PROTOCOL, Describe, Description, Hello, LookUp
from lmcache.integration.vllm.parallel.placement import config_of_rank
from lmcache.integration.vllm.parallel.planned_saves import PlannedSaves
from lmcache.integration.vllm.parallel.rank_service import RankService
from lmcache.integration.vllm.parallel.ranked_engine import RankedEngine
from lmcache.integration.vllm.parallel.ranks import Ranks
from lmcache.integration.vllm.parallel.rendezvous import listen, socket_path
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.manager import LMCacheManager
from lmcache.observability.metrics import Metrics
from lmcache.sockets.frames import MAX_FRAME_BYTES, receive_frame, send_frame
from tests.engine.helpers import CHUNK, PagesConnector, make_config, make_metadata, tokens_of
from tests.eventually import eventually

pytestmark = pytest.mark.vllm

WORLD = 2
TOKENS = tokens_of(6 * CHUNK)


class Engine:
    """Two ranks, and the scheduler's view of them."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.metrics = Metrics()
        self.paths = [directory / f"{rank}.sock" for rank in range(WORLD)]
        self.shared: list[SharedEngine] = []
        self.services: list[RankService] = []
        for rank in range(WORLD):
            metadata = make_metadata(tp_rank=rank, tp_size=WORLD)
            shared = SharedEngine(LMCacheManager(make_config(), metadata, PagesConnector()))
            stack.callback(shared.close)
            self.shared.append(shared)
            self.services.append(self.serve(rank))
        self.ranks = Ranks(self.paths, self.metrics)
        stack.callback(self.ranks.close)
        self.engine = RankedEngine(self.ranks, make_config(), make_metadata(tp_size=WORLD))

    def serve(self, rank: int) -> RankService:
        service = RankService(self.shared[rank], self.paths[rank], rank=rank, world_size=WORLD)
        self.shared[rank].companions.callback(service.close)
        return service

    def store(self, rank: int, num_tokens: int) -> None:
        slots = torch.arange(num_tokens)
        assert self.shared[rank].engine.store(TOKENS[:num_tokens], slot_mapping=slots) == num_tokens

    def held(self, rank: int) -> int:
        """Chunks that somebody holds besides the tier."""
        memory = self.shared[rank].manager.storage.memory
        count = 0
        for key in memory.keys():  # noqa: SIM118 - not a mapping
            with memory.get(key) as obj:  # type: ignore[union-attr]
                count += obj.ref_count > 2
        return count


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(ranks_module, "PAUSE_SECONDS", 0.0)
    with ExitStack() as stack:
        yield Engine(stack, tmp_path)


def test_a_lease_is_as_long_as_the_shortest_of_all_ranks(engine: Engine) -> None:
    engine.store(0, 5 * CHUNK)
    engine.store(1, 3 * CHUNK)
    keys = engine.engine.prefix_keys(TOKENS, paged=True)
    lease = engine.engine.prefetch(TOKENS, paged=True, keys=keys)
    assert lease.ready()
    assert lease.num_tokens == 3 * CHUNK
    assert lease.tokens_by_tier(CHUNK) == {"memory": 2 * CHUNK}
    assert [list(shared.handed_over) for shared in engine.shared] == [[lease.name]] * WORLD
    assert [engine.held(rank) for rank in range(WORLD)] == [5, 3]
    lease.release()
    lease.release()
    assert eventually(lambda: not any(engine.held(rank) for rank in range(WORLD)), seconds=30)
    assert engine.metrics.snapshot().get('lmcache_failures_total{reason="rank"}', 0) == 0


def test_what_a_scheduler_held_is_given_back_when_it_is_gone(engine: Engine) -> None:
    engine.store(0, CHUNK)
    engine.store(1, CHUNK)
    engine.engine.prefetch(TOKENS, paged=True, keys=engine.engine.prefix_keys(TOKENS, paged=True))
    assert engine.held(1) == 1
    engine.ranks.close()
    assert eventually(lambda: not any(engine.held(rank) for rank in range(WORLD)), seconds=30)
    assert engine.engine.descriptions(), "the next scheduler is served"


def test_a_rank_that_is_gone_is_a_miss_until_it_is_back(engine: Engine) -> None:
    engine.store(0, CHUNK)
    engine.store(1, CHUNK)
    keys = engine.engine.prefix_keys(TOKENS, paged=True)
    engine.services[1].close()
    lease = engine.engine.prefetch(TOKENS, paged=True, keys=keys)
    assert (lease.num_tokens, lease.ready()) == (0, True)
    assert engine.engine.descriptions() == []
    assert eventually(lambda: engine.held(0) == 0, seconds=30)
    engine.serve(1)
    assert eventually(lambda: bool(engine.engine.descriptions()), seconds=30)
    assert engine.engine.prefetch(TOKENS, paged=True, keys=keys).num_tokens == CHUNK
    assert engine.metrics.snapshot()['lmcache_failures_total{reason="rank"}'] >= 1


def test_a_rank_that_does_not_answer_is_a_miss(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.engine.descriptions()
    monkeypatch.setattr(engine.services[1], "_answer", lambda message: None)
    assert engine.ranks.ask(Describe(), Description, timeout=0.1) is None
    assert not engine.ranks.connected


def test_a_rank_whose_pages_are_not_known_serves_nothing(engine: Engine) -> None:
    engine.shared[1].engine.gpu_connector = None
    assert engine.engine.descriptions() == []
    engine.shared[1].engine.set_gpu_connector(PagesConnector())
    assert len(engine.engine.descriptions()) == WORLD


def test_everything_is_cleared_in_every_rank(engine: Engine) -> None:
    engine.store(0, CHUNK)
    engine.store(1, CHUNK)
    engine.engine.clear()
    assert [shared.engine.lookup(TOKENS, paged=True) for shared in engine.shared] == [0, 0]
    engine.services[0].close()
    with pytest.raises(RuntimeError, match="not every rank has forgotten"):
        engine.engine.clear()


def test_saves_are_seen_and_blocks_wait_for_every_rank(engine: Engine) -> None:
    saves, keys = PlannedSaves(engine.ranks), engine.engine.prefix_keys(TOKENS, paged=True)
    meta = LMCacheConnectorMetadata(saves=[SaveOp("a", TOKENS[: 2 * CHUNK], CHUNK, [0], keys[:2], "", "")])
    saves.planned(meta, CHUNK)
    assert meta.delayed_frees == []
    assert not saves.will_hold(keys[0]), "it was there before"
    release = threading.Event()
    engine.shared[1].saves.submit("a", [keys[1]], release.wait)
    assert saves.will_hold(keys[1])
    assert saves.delay_free("a")
    assert not saves.delay_free("b")
    following = LMCacheConnectorMetadata()
    saves.planned(following, CHUNK)
    assert following.delayed_frees == ["a"]
    for shared in engine.shared:
        shared.saves.free_when_done("a")
    assert [shared.saves.take_freed() for shared in engine.shared] == [{"a"}, set()]
    release.set()
    engine.shared[1].saves.wait()
    assert engine.shared[1].saves.take_freed() == {"a"}
    assert not saves.will_hold(keys[1])


def test_a_load_that_failed_in_one_rank_has_failed(engine: Engine) -> None:
    failed = FailedLoads(engine.ranks)
    engine.shared[1].failed_loads.update({"a", "never told to load"})
    failed.watch("a")
    failed.watch("b")
    assert "a" in failed
    assert "b" not in failed
    assert "never told to load" not in failed
    engine.shared[0].blend_reports["b"] = {"policy": "none"}
    assert failed.settle("b") == {"policy": "none"}
    assert failed.settle("a") is None
    assert "a" not in engine.shared[1].failed_loads


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(path))
    return connection


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff" * 20,
        msgspec.msgpack.encode({"type": "Nonsense"}),
        msgspec.msgpack.encode({"type": "LookUp", "lease": 7}),
        msgspec.msgpack.encode(Describe()),  # not before it has said who it is
    ],
)
def test_who_talks_nonsense_is_cut_off_and_others_are_served(payload: bytes, engine: Engine) -> None:
    with connect(engine.paths[0]) as stranger:
        send_frame(stranger, payload)
        assert closed(stranger)
    assert engine.engine.descriptions()


def test_a_frame_too_large_is_not_read(engine: Engine) -> None:
    with connect(engine.paths[0]) as stranger:
        stranger.sendall((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
        assert closed(stranger)
    assert engine.engine.descriptions()


def test_the_scheduler_of_another_engine_is_told_so_and_gets_nothing(engine: Engine) -> None:
    with connect(engine.paths[0]) as stranger:
        send_frame(stranger, msgspec.msgpack.encode(Hello(PROTOCOL, WORLD + 1, 0)))
        assert msgspec.msgpack.decode(receive_frame(stranger), type=Hello) == Hello(PROTOCOL, WORLD, 0)
        send_frame(stranger, msgspec.msgpack.encode(LookUp("x", 0, b"", "", "")))
        assert closed(stranger)
    strangers = Ranks([*engine.paths, engine.paths[0]], Metrics())
    assert strangers.ask(Describe(), Description) is None


def test_a_bad_question_is_refused_in_words_and_the_rank_lives(engine: Engine) -> None:
    assert engine.ranks.ask(LookUp("x", CHUNK, b"half a digest", "", ""), Description) is None
    assert engine.engine.descriptions()
    assert engine.shared[0].metrics.snapshot()['lmcache_failures_total{reason="rank_lookup"}'] == 1


class TestRendezvous:
    def test_the_directory_is_ours_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        path = socket_path("engine", 1)
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path != socket_path("engine", 0)
        assert path != socket_path("other", 1)
        assert len(os.fsencode(path.name)) < 30
        path.parent.chmod(0o755)
        with pytest.raises(PermissionError, match="closed to all others"):
            socket_path("engine", 1)

    def test_a_socket_that_a_dead_process_left_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "0.sock"
        listen(path).close()
        assert path.exists()
        with listen(path), pytest.raises(FileExistsError, match="the same engine_id"):
            listen(path)


def test_ranks_have_folders_of_their_own(tmp_path: Path) -> None:
    config = make_config(local_disk=str(tmp_path), max_local_disk_size=4)
    assert config_of_rank(config, 0, 1) == config
    each = [config_of_rank(config, rank, 4) for rank in range(4)]
    assert len({rank.local_disk for rank in each}) == 4
    assert {rank.max_local_disk_size for rank in each} == {4}
