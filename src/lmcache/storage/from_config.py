"""The slower tiers that a configuration asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from lmcache.config import LMCacheEngineConfig
from lmcache.config.schema import GIB
from lmcache.observability.logging import init_logger
from lmcache.observability.metrics import Metrics
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.codecs import make_codec
from lmcache.storage.disk import DiskSettings, DiskTierError, LocalDiskTier
from lmcache.storage.interface import Allocate
from lmcache.storage.policies import make_policy
from lmcache.storage.remote.interface import StoreOptions
from lmcache.storage.remote.other_sizes import OtherSizes
from lmcache.storage.remote.settings import RemoteSettings
from lmcache.storage.remote.stores import open_store
from lmcache.storage.remote.tier import LOOKUP_THREADS, RemoteTier

if TYPE_CHECKING:
    from lmcache.storage.encryption import KeyRing

logger = init_logger(__name__)


def disk_settings(config: LMCacheEngineConfig, capacity_bytes: int) -> DiskSettings:
    """``config.local_disk`` must be set."""
    assert config.local_disk is not None
    return DiskSettings(
        directory=config.local_disk,
        capacity_bytes=capacity_bytes,
        fsync=config.disk_fsync,
        read_threads=config.disk_io_threads,
        write_queue_bytes=int(config.disk_write_queue_size * GIB),
    )


def disk_format(config: LMCacheEngineConfig) -> ChunkFormat:
    """How chunks are written to the disk.

    Raises:
        ValueError: the codec or the keys cannot be used.
    """
    keys = _keys(config.disk_encryption_key_file, config.disk_encryption_keys, "disk_encryption_keys")
    return ChunkFormat(make_codec(config.disk_codec), keys)


def open_disk(
    config: LMCacheEngineConfig, allocate: Allocate, metrics: Metrics, *, share: float = 1.0
) -> LocalDiskTier | None:
    """None where there is to be none, or where it cannot be used, which is said in the log and counted.

    Args:
        share: of ``max_local_disk_size``.

    Raises:
        ValueError: the codec or the keys cannot be used: nothing is kept in the clear instead.
    """
    if config.local_disk is None:
        return None
    settings = disk_settings(config, int(config.max_local_disk_size * GIB * share))
    try:
        return LocalDiskTier(settings, allocate, make_policy(config.cache_policy), disk_format(config))
    except DiskTierError as error:
        metrics.failure("disk_start")
        logger.error("going on without the disk tier: %s", error)
        return None


def open_remote(
    config: LMCacheEngineConfig, allocate: Allocate, other_sizes: OtherSizes | None = None
) -> RemoteTier | None:
    """None where there is to be none. The store may be away.

    Raises:
        ValueError: the configuration cannot work.
    """
    if config.remote_url is None:
        return None
    keys = _keys(config.remote_encryption_key_file, config.remote_encryption_keys, "remote_encryption_keys")
    chunk_format = ChunkFormat(make_codec(config.remote_codec), keys)
    store = open_store(
        config.remote_url,
        StoreOptions(
            connections=config.remote_io_threads + config.remote_write_threads + LOOKUP_THREADS + 1,
            ttl_seconds=config.remote_ttl_seconds,
            extra=dict(config.extra_config),
        ),
    )
    settings = RemoteSettings(
        timeout=config.remote_timeout_seconds,
        lookup_timeout=config.remote_lookup_seconds,
        read_threads=config.remote_io_threads,
        write_threads=config.remote_write_threads,
        write_queue_bytes=int(config.remote_write_queue_size * GIB),
    )
    return RemoteTier(store, settings, allocate, chunk_format, other_sizes)


def _keys(file: Path | None, secret: SecretStr | None, name: str) -> KeyRing | None:
    """Raises:
    ValueError: the keys cannot be used, or what encrypts is not installed.
    """
    if file is None and secret is None:
        return None
    try:
        from lmcache.storage.encryption import KeyRing
    except ImportError as error:
        raise ValueError(f"encryption: {error}; pip install 'lmcache-blend[encryption]'") from error
    if file is not None:
        return KeyRing.from_file(file)
    assert secret is not None
    return KeyRing.parse(secret.get_secret_value(), name)
