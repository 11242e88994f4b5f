"""The parts of the adapter that can be told apart from a running vLLM."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the adapter imports vLLM")

from lmcache.integration.guard import never_raise
from lmcache.integration.model_identity import fingerprint
from lmcache.integration.vllm.layerwise import LayerwiseLoads
from lmcache.integration.vllm.pending_saves import PendingSaves
from lmcache.integration.vllm.prometheus import LMCacheStats
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.keys import Namespace, PrefixKey, prefix_keys
from lmcache.lease import PrefixLease
from lmcache.observability.metrics import Metrics

pytestmark = pytest.mark.vllm


def a_key() -> PrefixKey:
    return prefix_keys(Namespace(model="m", kv_dtype="float32", layout="l"), [1, 2], 2)[0]


class TestPendingSaves:
    def test_blocks_stay_until_the_save_is_done(self) -> None:
        saves, go, key = PendingSaves(), threading.Event(), a_key()
        saves.submit("a", [key], go.wait)
        assert saves.will_hold(key)
        assert saves.delay_free("a")
        assert not saves.delay_free("b"), "it has nothing under way"
        assert saves.take_freed() == set()
        go.set()
        saves.wait()
        assert saves.take_freed() == {"a"}
        assert saves.take_freed() == set(), "named once"
        assert not saves.will_hold(key)
        assert not saves.delay_free("a")
        saves.close()

    def test_a_request_is_freed_after_its_last_save(self) -> None:
        saves, go = PendingSaves(), threading.Event()
        saves.submit("a", [], lambda: None)
        saves.submit("a", [], go.wait)
        assert saves.delay_free("a")
        go.set()
        saves.wait(["a"])
        assert saves.take_freed() == {"a"}
        saves.close()

    def test_waiting_for_one_request_does_not_wait_for_others(self) -> None:
        saves, go = PendingSaves(), threading.Event()
        saves.submit("a", [], lambda: None)
        saves.submit("b", [], go.wait)
        saves.wait(["a", "unknown"])
        go.set()
        saves.close()

    def test_a_save_that_raises_still_frees(self) -> None:
        saves = PendingSaves()
        saves.submit("a", [a_key()], lambda: 1 / 0)
        saves.wait()
        assert not saves.will_hold(a_key())
        saves.close()

    def test_after_closing_saves_are_dropped(self) -> None:
        saves = PendingSaves()
        saves.close()
        saves.submit("a", [a_key()], lambda: pytest.fail("ran"))
        assert not saves.delay_free("a")


class TestLayerwiseLoads:
    def load(
        self, failed: list[str], layers: int = 3, broken_at: int | None = None
    ) -> tuple[LayerwiseLoads, list[int]]:
        loads, done = LayerwiseLoads(lambda op, error: failed.append(op)), []
        loads.set_layers(["a", "b", "c"])

        def steps():
            for layer in range(layers):
                if layer == broken_at:
                    raise OSError("injected")
                done.append(layer)
                yield

        loads.start("request", PrefixLease([]), steps())
        return loads, done

    def test_a_layer_is_there_when_it_is_asked_for(self) -> None:
        failed: list[str] = []
        loads, done = self.load(failed)
        loads.advance_to("a")
        assert done == [0]
        loads.advance_to("c")
        assert done == [0, 1, 2]
        loads.advance_to("b")
        loads.finish()
        assert failed == []

    def test_a_load_whose_hooks_never_came_has_failed(self) -> None:
        """A full CUDA graph replays without the hooks: the forward ran on pages that were not filled."""
        failed: list[str] = []
        loads, _ = self.load(failed)
        loads.finish()
        assert failed == ["request"]

    def test_an_error_in_the_middle_fails_the_load_once(self) -> None:
        failed: list[str] = []
        loads, _ = self.load(failed, broken_at=1)
        for layer in "abc":
            loads.advance_to(layer)
        loads.finish()
        assert failed == ["request"]


class TestFingerprint:
    def test_it_tells_weights_apart_and_not_times(self, tmp_path: Path) -> None:
        for name, byte in (("one", b"1"), ("same", b"1"), ("other", b"2")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(byte * 100_000)
            (tmp_path / name / "README.md").write_text(name)
        one, same, other = (fingerprint(tmp_path / name) for name in ("one", "same", "other"))
        assert one == same
        assert one != other

    def test_it_sees_the_last_bytes(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        file.write_bytes(bytes(1_000_000))
        before = fingerprint(tmp_path)
        file.write_bytes(bytes(999_999) + b"x")
        assert fingerprint(tmp_path) != before


def test_stats_are_the_growth_since_the_last_step() -> None:
    metrics = Metrics()
    metrics.reused("memory", 10)
    stats, seen = LMCacheStats.since({}, metrics)
    assert stats.data == {'lmcache_reused_tokens_total{tier="memory"}': 10}
    metrics.reused("memory", 5)
    more, seen = LMCacheStats.since(seen, metrics)
    assert stats.aggregate(more).data == {'lmcache_reused_tokens_total{tier="memory"}': 15}
    assert LMCacheStats.since(seen, metrics)[0].is_empty()


def test_an_exception_becomes_the_fallback_and_a_count() -> None:
    class Side:
        metrics = Metrics()

        @never_raise(lambda: 7)
        def call(self) -> int:
            raise OSError("injected")

    assert Side().call() == 7
    assert Side.metrics.snapshot()['lmcache_failures_total{reason="call"}'] == 1


def _leave_an_engine_open(closed: str) -> None:
    class Open:
        def close(self) -> None:
            Path(closed).touch()

    SharedEngine._close_at_exit()
    SharedEngine._live["engine"] = Open()  # type: ignore[assignment]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_leaving_engine_process_closes_what_is_open(start: str, tmp_path: Path) -> None:
    """vLLM's engine core is a child of multiprocessing, where `atexit` does not run."""
    closed = tmp_path / "closed"
    process = multiprocessing.get_context(start).Process(target=_leave_an_engine_open, args=(str(closed),))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert closed.exists()
