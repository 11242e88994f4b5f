"""The models whose KV is moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lmcache.metadata import LMCacheEngineMetadata

CHUNK_SIZE = 256
VOCABULARY = 128_256


@dataclass(frozen=True)
class ModelShape:
    name: str
    layers: int
    heads: int
    dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def metadata(self) -> LMCacheEngineMetadata:
        shape = (self.layers, 2, CHUNK_SIZE, self.heads, self.dim)
        return LMCacheEngineMetadata(model_name=self.name, kv_dtype=self.dtype, kv_shape=shape)

    @property
    def chunk_bytes(self) -> int:
        return self.metadata.bytes_per_token * CHUNK_SIZE

    def num_chunks(self, nbytes: int) -> int:
        """Chunks in about ``nbytes``, two at least."""
        return max(2, nbytes // self.chunk_bytes)


SMOLLM2 = ModelShape("SmolLM2-135M", 30, 3, 64, torch.bfloat16)
SMOLLM2_FP32 = ModelShape("SmolLM2-135M", 30, 3, 64, torch.float32)
LLAMA_8B = ModelShape("Llama-3.1-8B", 32, 8, 128, torch.bfloat16)


def random_prompt(seed: int, length: int) -> npt.NDArray[np.int64]:
    """``length`` token ids; the same for the same seed, in every process."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)
