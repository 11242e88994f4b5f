"""Two managers, as of two servers, with one shared store."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from lmcache.config import LMCacheEngineConfig
from lmcache.manager import LMCacheManager
from tests.engine.helpers import CHUNK, kv_of, make_config, make_metadata, tokens_of

TOKENS = tokens_of(4 * CHUNK)


def shared(directory: Path, **overrides: object) -> LMCacheEngineConfig:
    return make_config(**{"remote_url": f"file://{directory}/store", "remote_lookup_seconds": 30.0, **overrides})


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def url(tmp_path: Path) -> Path:
    with LMCacheManager(shared(tmp_path), make_metadata()) as first:
        assert first.engine.store(TOKENS, kv_of(TOKENS)) == 4 * CHUNK
    return tmp_path


@pytest.fixture
def second(url: Path):
    with LMCacheManager(shared(url), make_metadata()) as second:
        yield second


def test_lookup_asks_the_store(second: LMCacheManager) -> None:
    assert second.engine.lookup(TOKENS) == 4 * CHUNK
    assert second.engine.contains(TOKENS)
    assert second.engine.lookup([token + 9_000 for token in TOKENS]) == 0


def test_retrieve_gets_it_from_there_and_then_from_memory(second: LMCacheManager) -> None:
    for tier in ("remote", "memory"):
        blob, found = second.engine.retrieve(TOKENS, return_tuple=False)
        assert found.all()
        assert torch.equal(blob, kv_of(TOKENS))
        assert second.stats().reused_tokens[tier] == 4 * CHUNK


def test_a_lease_that_may_not_wait_knows_only_what_was_asked_before(second: LMCacheManager) -> None:
    engine = second.engine
    with engine.prefetch(TOKENS) as lease:
        assert lease.num_tokens == 0
    with engine.prefetch(TOKENS, ask_stores=True) as lease:
        assert lease.wait(60)
        assert lease.tokens_by_tier() == {"remote": 4 * CHUNK}
    engine.clear()


def test_asking_first_and_then_leasing(second: LMCacheManager) -> None:
    inquiry = second.engine.ask(second.engine.prefix_keys(TOKENS))
    inquiry.wait()
    with second.engine.prefetch(TOKENS) as lease:
        assert lease.wait(60)
        assert lease.num_tokens == 4 * CHUNK


def test_what_is_read_from_the_store_goes_to_the_disk_as_well(url: Path, tmp_path: Path) -> None:
    config = shared(url, local_disk=tmp_path / "disk", max_local_disk_size=64 / 1024)
    with LMCacheManager(config, make_metadata()) as manager:
        assert manager.engine.retrieve(TOKENS)[1].all()
        assert manager.storage.flush(60)
    without = make_config(local_disk=tmp_path / "disk", max_local_disk_size=64 / 1024)
    with LMCacheManager(without, make_metadata()) as manager:
        assert manager.engine.lookup(TOKENS) == 4 * CHUNK


def test_another_tenant_finds_nothing(second: LMCacheManager) -> None:
    assert second.engine.lookup(TOKENS, cache_salt="another") == 0


@pytest.mark.parametrize("codec", ["zstd", "fp8", "delta"])
def test_codecs_from_the_configuration(tmp_path: Path, codec: str) -> None:
    pytest.importorskip("zstandard")
    config = shared(tmp_path, remote_codec=codec, remote_encryption_keys="a:" + "A" * 43 + "=")
    with LMCacheManager(config, make_metadata()) as first:
        first.engine.store(TOKENS, kv_of(TOKENS))
    stored = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert stored
    assert kv_of(TOKENS).view(torch.uint8).numpy().tobytes()[:64] not in stored
    with LMCacheManager(config, make_metadata()) as second:
        blob, found = second.engine.retrieve(TOKENS, return_tuple=False)
        assert found.all()
        error = (blob.float() - kv_of(TOKENS).float()).abs().max()
        assert error <= (0 if codec == "zstd" else kv_of(TOKENS).float().abs().max() / 14)


@pytest.mark.parametrize("codec", ["zstd", "fp8", "delta"])
def test_what_is_not_exact_stays_with_servers_that_take_it(tmp_path: Path, codec: str) -> None:
    """It once went to the disk under exact keys, and from there, set to another codec, to the store and everybody."""
    pytest.importorskip("zstandard")
    disk = {"local_disk": tmp_path / "disk", "max_local_disk_size": 64 / 1024}
    with LMCacheManager(shared(tmp_path, remote_codec=codec), make_metadata()) as first:
        first.engine.store(TOKENS, kv_of(TOKENS))
    with LMCacheManager(shared(tmp_path, remote_codec=codec, **disk), make_metadata()) as second:
        blob, found = second.engine.retrieve(TOKENS, return_tuple=False)
        assert found.all()
        assert torch.equal(blob, kv_of(TOKENS)) == (codec == "zstd")
        assert second.storage.flush(60)
    with LMCacheManager(shared(tmp_path, remote_codec=codec, **disk), make_metadata()) as again:
        assert again.engine.lookup(TOKENS) == 4 * CHUNK
    for setting in (make_config(**disk), shared(tmp_path, remote_codec="raw", **disk), shared(tmp_path)):
        with LMCacheManager(setting, make_metadata()) as exact:
            blob, found = exact.engine.retrieve(TOKENS, return_tuple=False)
            assert bool(found.all()) == (codec == "zstd")
            if found.any():
                assert torch.equal(blob, kv_of(TOKENS))
            exact.engine.lookup(TOKENS)
            assert exact.storage.flush(60)


@pytest.mark.parametrize("codec", ["raw", "zstd", "fp8", "delta"])
def test_codecs_and_keys_of_the_disk(tmp_path: Path, codec: str) -> None:
    pytest.importorskip("zstandard")
    disk = {"local_disk": tmp_path / "disk", "max_local_disk_size": 64 / 1024, "disk_codec": codec}
    config = make_config(**disk, disk_encryption_keys="a:" + "A" * 43 + "=")
    with LMCacheManager(config, make_metadata()) as first:
        first.engine.store(TOKENS, kv_of(TOKENS))
        assert first.storage.flush(60)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "disk").rglob("*.kv"))
    assert stored
    assert kv_of(TOKENS).view(torch.uint8).numpy().tobytes()[:64] not in stored
    exact = codec in ("raw", "zstd")
    with LMCacheManager(config, make_metadata()) as second:
        blob, found = second.engine.retrieve(TOKENS, return_tuple=False)
        assert found.all()
        assert torch.equal(blob, kv_of(TOKENS)) == exact
    with LMCacheManager(make_config(**{**disk, "disk_codec": "raw"}), make_metadata()) as without:
        assert without.engine.lookup(TOKENS) == 0


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"remote_url": "nonsense"}, "must be a URL"),
        ({"remote_url": "gopher://host"}, "its scheme must be one of file, mooncake, s3, redis"),
        ({"remote_url": "file://host/kv"}, "three slashes"),
        ({"remote_encryption_keys": "a:short"}, "id:key|32 bytes"),
        ({"remote_encryption_key_file": "/no/such/file"}, "cannot be read"),
        ({"remote_codec": "gzip"}, "raw"),
        ({"local_disk": "/tmp/kv", "disk_encryption_keys": "a:short"}, "id:key|32 bytes"),
        ({"local_disk": "/tmp/kv", "disk_encryption_key_file": "/no/such/file"}, "cannot be read"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_at_the_start(
    tmp_path: Path, setting: dict[str, str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        LMCacheManager(shared(tmp_path, **setting), make_metadata())


def test_the_keys_are_told_to_nobody() -> None:
    secret = "a:" + "A" * 43 + "="
    config = make_config(remote_encryption_keys=secret)
    assert secret not in repr(config) + str(config.model_dump(mode="json"))
    with pytest.raises(ValueError, match="only one of them") as caught:
        make_config(remote_encryption_keys=secret, remote_encryption_key_file="/etc/keys")
    assert secret not in str(caught.value)
    with pytest.raises(ValueError, match="only one of them") as caught:
        make_config(disk_encryption_keys=secret, disk_encryption_key_file="/etc/keys")
    assert secret not in str(caught.value)
