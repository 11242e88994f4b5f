"""Which model this is, and the shape of its KV."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmcache.keys import Namespace, Shard

TOKEN_MAJOR = "token-major-1"
"""Host layout ``[layer][K|V][token][head][dim]``, version 1: a layer's share is one contiguous piece."""


@dataclass(frozen=True)
class LMCacheEngineMetadata:
    """One process's share of one model.

    ``kv_shape`` is ``(layers, 2, chunk_size, kv_heads, head_dim)`` of this process's shard; for MLA the second
    number is 1 and there is one "head" of ``latent + rope`` dims. ``world_size`` and ``worker_id`` count over
    tensor and pipeline parallelism together. ``fmt`` is the layout of blobs on the tensor path: "vllm" is
    ``[L, 2, T, H, D]``, "huggingface" is ``[L, 2, H, T, D]``. ``tp_rank`` and ``tp_size`` say which part of the KV
    heads the shard has: where ranks share heads, they are those of :meth:`lmcache.keys.Shard.of_heads`.
    """

    model_name: str
    world_size: int = 1
    worker_id: int = 0
    fmt: str = "vllm"
    kv_dtype: torch.dtype = torch.bfloat16
    kv_shape: tuple[int, int, int, int, int] = (32, 2, 256, 8, 128)
    use_mla: bool = False
    revision: str = ""
    model_config: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        if self.fmt not in ("vllm", "huggingface"):
            raise ValueError(f"fmt={self.fmt!r}: must be 'vllm' ([L,2,T,H,D]) or 'huggingface' ([L,2,H,T,D])")
        if len(self.kv_shape) != 5 or any(n < 1 for n in self.kv_shape):
            raise ValueError(
                f"kv_shape={self.kv_shape}: must be five positive numbers (layers, 2, chunk_size, kv_heads, head_dim)"
            )
        if self.kv_shape[1] != (1 if self.use_mla else 2):
            raise ValueError(f"kv_shape={self.kv_shape}: the second number is 1 for MLA and 2 otherwise")

    @property
    def num_layers(self) -> int:
        return self.kv_shape[0]

    @property
    def bytes_per_token(self) -> int:
        layers, planes, _, heads, dim = self.kv_shape
        return layers * planes * heads * dim * self.kv_dtype.itemsize

    @property
    def shard(self) -> Shard:
        return Shard(self.tp_rank, self.tp_size, self.pp_rank, self.pp_size)

    @property
    def total_kv_heads(self) -> int:
        """Of the whole model; 1 for MLA."""
        return 1 if self.use_mla else self.kv_shape[3] * self.tp_size

    def namespace(
        self, layout: str = TOKEN_MAJOR, *, lora: str = "", cache_salt: str = "", codec: str = ""
    ) -> Namespace:
        """The key namespace of this shard's KV held in ``layout``; ``codec`` as in :class:`Namespace`."""
        return Namespace(
            model=self.model_name,
            kv_dtype=str(self.kv_dtype).removeprefix("torch."),
            layout=layout,
            revision=self.revision,
            model_config=self.model_config,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            pp_rank=self.pp_rank,
            pp_size=self.pp_size,
            lora=lora,
            cache_salt=cache_salt,
            codec=codec,
        )
