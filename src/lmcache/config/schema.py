"""``LMCacheEngineConfig``: what can be set, what is allowed, and what it means."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from lmcache.config.sources import (
    CONFIG_FILE_VARIABLE,
    Values,
    from_arguments,
    from_engine,
    from_environment,
    from_yaml,
)
from lmcache.config.value_types import (
    BlendSegmentation,
    Bool,
    ChunkLayout,
    CodecName,
    Float,
    Int,
    JsonObject,
    Layers,
    OptionalDirectory,
    OptionalFloat,
    OptionalSecret,
    OptionalThresholds,
    OptionalUrl,
    PolicyName,
    Ratios,
)
from lmcache.config.wrong_values import Contradiction, ContradictionError, explain

GIB = 1 << 30
_EXACT_CODECS = ("raw", "zstd")


class LMCacheEngineConfig(BaseModel):
    """Frozen. Build it with :meth:`load`, :meth:`from_env`, :meth:`from_file` or :meth:`from_defaults`.

    All of them raise ValueError for a value that does not parse, is out of range or contradicts another; the message
    names the key, the value, where it came from and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    chunk_size: Int = Field(256, ge=1, le=65536, description="Tokens in a chunk, the unit that is stored and found.")
    chunk_layout: ChunkLayout = Field(
        "automatic",
        description="How a chunk's bytes lie: automatic (on a CPU the engine's own pages, the fastest) or token_major, "
        "which every engine reads.",
    )
    local_cpu: Bool = Field(True, description="Keep chunks in host memory. Off: it only stages for disk and store.")
    max_local_cpu_size: Float = Field(5.0, gt=0, description="Host memory for chunks, in GiB. Grows as it is used.")
    local_disk: OptionalDirectory = Field(
        None, description="Directory of the disk tier (file:// allowed); unset: no disk. One server a directory."
    )
    max_local_disk_size: Float = Field(
        20.0, ge=0, description="What the disk tier may take, in GiB; never exceeded, its index included."
    )
    disk_fsync: Bool = Field(
        False, description="Flush every chunk to the medium before it counts as stored: survives power loss, slower."
    )
    disk_io_threads: Int = Field(4, ge=1, le=64, description="Threads that read from disk.")
    disk_write_queue_size: Float = Field(
        0.5, gt=0, description="GiB of chunks that may wait to be written; beyond it new ones are not written."
    )
    disk_codec: CodecName = Field(
        "raw", description="How chunks are packed on disk: raw, zstd (exact), fp8 or delta (smaller, not exact)."
    )
    disk_encryption_key_file: OptionalDirectory = Field(
        None, description="File with the keys that what is on disk is encrypted with, a line id:base64 each."
    )
    disk_encryption_keys: OptionalSecret = Field(
        None, description="The keys for the disk themselves, id:base64, separated by commas; never shown."
    )
    max_disk_wait_seconds: Float = Field(
        10.0, ge=0, description="How long a request waits for chunks from disk or store before the rest is computed."
    )
    remote_url: OptionalUrl = Field(
        None, description="Store that several servers share, such as redis://host:6379; unset: none."
    )
    remote_lookup_seconds: Float = Field(
        0.2, gt=0, description="How long the shared store may take to say what it holds; later it counts as nothing."
    )
    remote_timeout_seconds: Float = Field(
        5.0, gt=0, description="How long one read or write of chunks in the shared store may take."
    )
    remote_io_threads: Int = Field(4, ge=1, le=64, description="Reads from the shared store under way at once.")
    remote_write_threads: Int = Field(2, ge=1, le=64, description="Writes to the shared store under way at once.")
    remote_write_queue_size: Float = Field(
        0.5, gt=0, description="GiB of chunks that may wait to be written there; beyond it new ones are not written."
    )
    remote_ttl_seconds: OptionalFloat = Field(
        None, gt=0, description="After this long the shared store may drop a chunk; unset: the store's own eviction."
    )
    remote_codec: CodecName = Field(
        "raw", description="How chunks are packed there: raw, zstd (exact), fp8 or delta (smaller, not exact)."
    )
    remote_encryption_key_file: OptionalDirectory = Field(
        None, description="File with the keys that what is stored there is encrypted with, a line id:base64 each."
    )
    remote_encryption_keys: OptionalSecret = Field(
        None, description="The keys themselves, id:base64, separated by commas; never shown."
    )
    server_socket: OptionalDirectory = Field(
        None,
        description="Socket of an lmcache server, which then has the memory, disk and store of all; unset: our own.",
    )
    server_timeout_seconds: Float = Field(
        1.0, gt=0, description="How long the server may take for an answer; later it counts as nothing."
    )
    server_huge_pages: Bool = Field(
        True, description="lmcache server takes huge pages for its memory, as many as the system has set aside."
    )
    use_layerwise: Bool = Field(False, description="Load layer by layer while the forward runs.")
    save_decode_cache: Bool = Field(False, description="Also keep the KV of generated tokens.")
    save_unfull_chunk: Bool = Field(False, description="Also keep the last chunk of a prompt when it is not full.")
    cache_policy: PolicyName = Field("LRU", description="Which chunk goes when room is needed.")
    min_retrieve_tokens: Int = Field(0, ge=0, description="A hit of fewer tokens is not used.")
    lmcache_instance_id: str = Field(
        "lmcache", min_length=1, description="Name of this instance in logs, metrics and LMCacheEngineBuilder."
    )
    enable_kv_events: Bool = Field(False, description="Tell listeners which chunks were stored.")
    enable_blending: Bool = Field(False, description="CacheBlend: reuse known passages anywhere in the prompt.")
    blend_policy: str = Field("sampled_attention", min_length=1, description="Which reused tokens are recomputed.")
    blend_corrector: str = Field("kriging", min_length=1, description="How the tokens that are not recomputed follow.")
    blend_check_layers: Layers = Field(
        (1,), min_length=1, description="Layers at which kv_deviation chooses, ascending."
    )
    blend_recompute_ratios: Ratios = Field(
        (0.15,), min_length=1, description="Share of reused tokens to recompute, one a check layer; the last counts."
    )
    blend_thresholds: OptionalThresholds = Field(
        None, description="Deviation above which a token is recomputed; unset: the ratios decide."
    )
    blend_special_str: str = Field(" # # ", min_length=1, description="Separator between passages.")
    blend_segmentation: BlendSegmentation = Field(
        "automatic", description="How passages are found: automatic, separator (blend_special_str) or explicit."
    )
    blend_min_tokens: Int = Field(256, ge=1, description="A shorter passage is not blended.")
    blend_min_coverage: Float = Field(
        0.3, ge=0, le=1, description="Share of the tokens behind the prefix that must be known; below it no blending."
    )
    blend_cuda_graphs: Bool = Field(
        True, description="On a GPU: replay small forwards of a blend as CUDA graphs, captured at the start."
    )
    extra_config: JsonObject = Field(default_factory=dict, description="Settings of third-party parts (JSON).")

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def inexact_codec(self) -> str:
        """The codecs because of which KV may come back changed; empty where all of it comes back as it was."""
        if self.server_socket is not None:
            return ""  # a server keeps only what is exact
        used = {
            None if self.local_disk is None else self.disk_codec,
            None if self.remote_url is None else self.remote_codec,
        }
        return "+".join(sorted(codec for codec in used if codec is not None and codec not in _EXACT_CODECS))

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> LMCacheEngineConfig:
        if contradictions := list(self._contradictions()):
            raise ContradictionError(contradictions)
        return self

    def _contradictions(self) -> Iterator[Contradiction]:
        if not self.local_cpu and self.local_disk is None and self.remote_url is None:
            yield Contradiction(("local_cpu", "local_disk"), "nowhere to keep anything; switch one of them on")
        if self.remote_encryption_keys is not None and self.remote_encryption_key_file is not None:
            yield Contradiction(("remote_encryption_keys", "remote_encryption_key_file"), "only one of them may be set")
        if self.disk_encryption_keys is not None and self.disk_encryption_key_file is not None:
            yield Contradiction(("disk_encryption_keys", "disk_encryption_key_file"), "only one of them may be set")
        if self.local_disk is not None and self.max_local_disk_size == 0:
            yield Contradiction(("local_disk", "max_local_disk_size"), "a disk tier needs a size above 0")
        layers, ratios, thresholds = self.blend_check_layers, self.blend_recompute_ratios, self.blend_thresholds
        if list(layers) != sorted(set(layers)):
            yield Contradiction(("blend_check_layers",), "layers must ascend")
        if len(ratios) != len(layers):
            yield Contradiction(("blend_recompute_ratios", "blend_check_layers"), "one ratio is needed for each layer")
        if list(ratios) != sorted(ratios, reverse=True):
            yield Contradiction(
                ("blend_recompute_ratios",), "ratios must not rise: each layer chooses among the tokens of the last"
            )
        if thresholds is not None and len(thresholds) != len(layers):
            yield Contradiction(("blend_thresholds", "blend_check_layers"), "one threshold is needed for each layer")

    def __eq__(self, other: object) -> bool:
        """Equal values are equal, wherever they came from."""
        return isinstance(other, LMCacheEngineConfig) and self.__dict__ == other.__dict__

    @classmethod
    def load(
        cls, *, environ: Mapping[str, str] | None = None, engine_overrides: Mapping[str, Any] | None = None
    ) -> LMCacheEngineConfig:
        """Defaults, then the YAML file named by ``LMCACHE_CONFIG_FILE``, then ``LMCACHE_<KEY>``, then
        ``engine_overrides["lmcache.<key>"]`` (an engine's ``kv_connector_extra_config``); later ones win.

        ``environ`` stands in for ``os.environ``.
        """
        environ = os.environ if environ is None else environ
        file = environ.get(CONFIG_FILE_VARIABLE)
        return cls._build(
            from_yaml(Path(file), cls.model_fields) if file else {},
            from_environment(environ, cls.model_fields),
            from_engine(engine_overrides or {}, cls.model_fields),
        )

    @classmethod
    def from_env(cls) -> LMCacheEngineConfig:
        """Defaults, the YAML file named by ``LMCACHE_CONFIG_FILE`` if set, and the environment."""
        return cls.load()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> LMCacheEngineConfig:
        """Defaults and one YAML file; the environment is not read."""
        return cls._build(from_yaml(Path(path), cls.model_fields))

    @classmethod
    def from_defaults(cls, **overrides: Any) -> LMCacheEngineConfig:
        """Defaults and keyword arguments; the environment is not read."""
        return cls._build(from_arguments(overrides, cls.model_fields))

    @classmethod
    def _build(cls, *layers: Values) -> LMCacheEngineConfig:
        """Later layers win. A value that a later one replaces is not looked at."""
        values: Values = {}
        for layer in layers:
            values.update(layer)
        try:
            config = cls.model_validate({key: value.raw for key, value in values.items()})
        except ValidationError as error:
            raise ValueError(explain(error, values, cls.model_json_schema())) from None
        config._sources.update({key: value.source for key, value in values.items()})
        return config

    def source_of(self, key: str) -> str:
        """Where the value of ``key`` came from, in words."""
        return self._sources.get(key, "default")
