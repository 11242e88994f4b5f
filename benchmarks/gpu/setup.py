"""What is measured with which vLLM: the model's shape, the variants, and the options that all benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Engine and caller in one process: what is timed has no hop between processes, in any variant.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

# Settings of Llama-3.1-8B (config.json); the weights are drawn at random.
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
TINY: dict[str, Any] = LLAMA_8B | {
    "head_dim": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "torch_dtype": "float32",
    "vocab_size": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


SHARED_OPTIONS = ("graphs", "tiny", "dynamic", "extra", "kv_cache_dtype")


@dataclass(frozen=True)
class Setup:
    """How a vLLM is started. ``host_gib`` is the host memory that a connector may keep KV in."""

    variant: str
    host_gib: float
    max_tokens: int
    batched_tokens: int
    prefix_caching: bool = True
    graphs: str = "none"
    tiny: bool = False
    dynamic: bool = False
    extra: str = "{}"
    kv_cache_dtype: str = "auto"

    @classmethod
    def of(
        cls,
        options: argparse.Namespace,
        variant: str,
        max_tokens: int,
        batched_tokens: int,
        *,
        prefix_caching: bool = True,
    ) -> Setup:
        """With what :func:`parser` has read."""
        shared = {name: getattr(options, name) for name in SHARED_OPTIONS}
        return cls(variant, options.host_gib, max_tokens, batched_tokens, prefix_caching, **shared)

    @property
    def shape(self) -> dict[str, Any]:
        return TINY if self.tiny else LLAMA_8B

    @property
    def kv_bytes_per_token(self) -> int:
        shape, size = self.shape, 4 if self.tiny else 2
        if self.kv_cache_dtype.startswith("fp8"):
            size = 1
        heads, layers = int(shape["num_key_value_heads"]), int(shape["num_hidden_layers"])
        return 2 * layers * heads * int(shape["head_dim"]) * size

    @property
    def host_tokens(self) -> int:
        """Tokens whose KV fills ``host_gib``."""
        return int(self.host_gib * GIB) // self.kv_bytes_per_token


PLAIN, OFFLOADING, OURS, SERVER, PREFIX_ONLY, BLEND = "plain", "offloading", "ours", "server", "prefix", "blend"
WITH_BLENDING = (OURS, SERVER, BLEND)
LABELS = {
    PLAIN: "plain vLLM",
    OFFLOADING: "OffloadingConnector",
    OURS: "ours",
    SERVER: "ours, lmcache server",
    PREFIX_ONLY: "ours, prefixes only",
    BLEND: "ours, CacheBlend",
}


def transfer_options(setup: Setup, server_socket: Path | None = None) -> dict[str, Any] | None:
    """Arguments of vLLM's ``KVTransferConfig``; None: no connector."""
    if setup.variant == PLAIN:
        return None
    # vLLM's connector refuses to work on a CPU; there ours stands in for it, to try the benchmark out.
    if setup.variant == OFFLOADING and not setup.tiny:
        return {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": int(setup.host_gib * GIB)},
        }
    options: dict[str, Any] = {
        "kv_connector": "LMCacheConnectorV1",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.enable_blending": setup.variant in WITH_BLENDING,
            "lmcache.max_local_cpu_size": setup.host_gib,
            **({} if server_socket is None else {"lmcache.server_socket": str(server_socket)}),
            **json.loads(setup.extra),
        },
    }
    if setup.dynamic:
        options["kv_connector"] = "LMCacheConnectorV1Dynamic"
        options["kv_connector_module_path"] = "lmcache.integration.vllm.lmcache_connector_v1"
    return options


# What vLLM runs its model by. The sizes are few, so that a start takes seconds.
GRAPHS: dict[str, dict[str, Any]] = {
    "none": {"enforce_eager": True},
    "full": {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 96, 128, 256],
        }
    },
    "compiled": {},
}
GRAPH_LABELS = {
    "none": "eager",
    "full": "CUDA graphs of whole forwards up to 256 tokens, without torch.compile",
    "compiled": "torch.compile and CUDA graphs, vLLM's default",
}


def add_graphs(found: argparse.ArgumentParser) -> None:
    found.add_argument(
        "--graphs",
        choices=list(GRAPHS),
        default="none",
        help="; ".join(f"{name}: {label}" for name, label in GRAPH_LABELS.items()) + " (default %(default)s)",
    )


def parser(doc: str | None, variants: Sequence[str], host_gib: float) -> argparse.ArgumentParser:
    """The options that all benchmarks have. ``variant`` is set in the process that runs one."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--variants", type=words, default=list(variants), help=f"of {','.join(variants)}")
    found.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for the figures")
    found.add_argument("--host-gib", type=float, default=host_gib, help="host memory for KV (default %(default)s)")
    add_graphs(found)
    found.add_argument("--dynamic", action="store_true", help="our own connector class instead of vLLM's wrapper")
    found.add_argument("--extra", default="{}", help="JSON: more of our configuration, as kv_connector_extra_config")
    found.add_argument("--kv-cache-dtype", default="auto", help="vLLM's, such as fp8 (default %(default)s)")
    found.add_argument("--limit", type=float, default=240, help="seconds for a variant, then it is ended")
    found.add_argument("--tiny", action="store_true", help="two small layers on a CPU: only tries this script out")
    found.add_argument("--variant", help=argparse.SUPPRESS)
    return found


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def whole_numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def numbers(text: str) -> list[float]:
    return [float(word) for word in words(text)]
