"""Codecs, by name: how a chunk's bytes are packed for a slow tier.

======== ======== ============================================================ ==================================
name     exact    what it does                                                 needs
======== ======== ============================================================ ==================================
raw      yes      nothing
zstd     yes      the bytes of like meaning together, then Zstandard           ``lmcache-blend[codecs]``
fp8      no       8-bit numbers (e4m3) with a scale for every 128
delta    no       differences between tokens in few steps, then Zstandard      ``lmcache-blend[codecs]``
======== ======== ============================================================ ==================================
"""

from __future__ import annotations

from importlib.metadata import EntryPoint

from lmcache.storage.codecs.interface import Codec

_WHERE = {
    "raw": "lmcache.storage.codecs.raw:RawCodec",
    "zstd": "lmcache.storage.codecs.zstd:ZstdCodec",
    "fp8": "lmcache.storage.codecs.fp8:Fp8Codec",
    "delta": "lmcache.storage.codecs.delta:DeltaCodec",
}
CODEC_NAMES = tuple(_WHERE)


def make_codec(name: str) -> Codec:
    """Raises:
    ValueError: no such codec, or what it needs is not installed.
    """
    if name not in _WHERE:
        raise ValueError(f"no codec {name!r}: must be one of {', '.join(CODEC_NAMES)}")
    try:
        codec: type[Codec] = EntryPoint(name, _WHERE[name], "").load()
    except ImportError as error:
        raise ValueError(f"codec {name!r}: {error}; pip install 'lmcache-blend[codecs]'") from error
    return codec()
