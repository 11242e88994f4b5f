"""Remote stores by the scheme of their URL.

Another distribution adds its own through the entry-point group ``lmcache.remote_stores``; the name is the scheme::

    [project.entry-points."lmcache.remote_stores"]
    mystore = "my_package:MyStore"

The class derives from :class:`~lmcache.storage.remote.interface.RemoteStore`. One of ours cannot be replaced so.
"""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint, entry_points
from urllib.parse import urlsplit

from lmcache.storage.remote.interface import RemoteStore, StoreOptions

GROUP = "lmcache.remote_stores"

# Imported when they are asked for: each needs a client library of its own.
_OURS = {
    "file": "lmcache.storage.remote.file_store:FileStore",
    "mooncake": "lmcache.storage.remote.mooncake_store:MooncakeStore",
    "s3": "lmcache.storage.remote.s3_store:S3Store",
    **dict.fromkeys(("redis", "rediss", "unix", "redis-cluster"), "lmcache.storage.remote.redis_store:RedisStore"),
}
_EXTRAS = {**dict.fromkeys(("redis", "rediss", "unix", "redis-cluster"), "redis"), "s3": "s3", "mooncake": "mooncake"}
"""What to install where the import of one of ours fails, by scheme."""


def store_schemes() -> list[str]:
    """Every scheme that :func:`open_store` takes: ours, then those that other distributions installed."""
    return [*_OURS, *sorted(point.name for point in entry_points(group=GROUP) if point.name not in _OURS)]


def open_store(url: str, options: StoreOptions) -> RemoteStore:
    """The store at ``url``. It is not connected to yet.

    Raises:
        ValueError: no such scheme, what it needs is not installed, or the URL cannot be meant.
    """
    scheme = urlsplit(url).scheme.lower()
    if scheme in _OURS:
        point = EntryPoint(scheme, _OURS[scheme], GROUP)
    else:
        installed = [point for point in entry_points(group=GROUP) if point.name.lower() == scheme]
        if not installed:
            raise ValueError(f"remote_url={url!r}: its scheme must be one of {', '.join(store_schemes())}")
        if len({point.value for point in installed}) > 1:
            where = " and ".join(sorted(point.value for point in installed))
            raise ValueError(f"remote_url={url!r}: {scheme}:// is installed twice, as {where}: uninstall one of them")
        point = installed[0]
    return _load(scheme, point)(url, options)


def _load(scheme: str, point: EntryPoint) -> type[RemoteStore]:
    try:
        store = point.load()
    except (ImportError, AttributeError) as error:
        extra = _EXTRAS.get(scheme)
        cure = f"; pip install 'lmcache-blend[{extra}]'" if extra else ""
        raise ValueError(f"{scheme}:// needs {point.value}, which cannot be imported: {error}{cure}") from error
    if not (inspect.isclass(store) and issubclass(store, RemoteStore)):
        raise ValueError(f"{scheme}:// is installed as {point.value}, which is not a subclass of RemoteStore")
    return store
