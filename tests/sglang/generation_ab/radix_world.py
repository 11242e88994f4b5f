"""SGLang's own ``LMCRadixCache`` over its own small pools on the CPU. Runs where that SGLang can be imported."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from array import array
from pathlib import Path
from typing import Any

import torch
from sglang.srt import server_args as sgl_server_args
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache import allocator as sgl_allocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.sglang.generation_ab.true_kv import true_kv

LAYERS, HEADS, DIM, DTYPE = 3, 2, 4, torch.bfloat16


class _Stream:
    """What SGLang wants of a stream, on a device that has none."""

    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _XpuInName:
    """0.5.13 and later choose the layerwise connector by this name alone."""

    type = "xpu"


def write_model(folder: Path, tp_size: int = 1) -> Path:
    """A model of which each rank's pools hold its share, without weights."""
    folder.mkdir(exist_ok=True)
    heads = HEADS * tp_size
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": heads * DIM,
        "intermediate_size": 16, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": DIM,
        "num_hidden_layers": LAYERS, "vocab_size": 1000, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclasses.dataclass(frozen=True)
class Served:
    """What became of one request: tokens that were in the radix tree, that the cache brought, and wrong KV rows."""

    resident: int
    loaded: int
    wrong: int
    total: int


class World:
    """``mode`` is "A" (0.5.12), "IP" or "MP" (0.5.13 to 0.5.20: layerwise, two-phase)."""

    def __init__(
        self,
        folder: Path,
        mode: str,
        page_size: int,
        slots: int = 256,
        tp_size: int = 1,
        rank: int = 0,
        tp_group: Any = None,
    ) -> None:
        """Args:
        tp_group: SGLang's ``GroupCoordinator``.
        """
        self.mode, self.page_size = mode, page_size
        config_file = folder / "lmcache.yaml"
        if not config_file.exists():
            config_file.write_text("mp_host: localhost\nmp_port: 5556\n")
        _set_server_args(page_size, str(config_file))
        self.module = _radix_module()
        self.kv = MHATokenToKVPool(slots, page_size, DTYPE, HEADS, DIM, LAYERS, "cpu", False)
        kind, extra = (
            (sgl_allocator.TokenToKVPoolAllocator, ())
            if page_size == 1
            else (sgl_allocator.PagedTokenToKVPoolAllocator, (page_size,))
        )
        self.allocator = kind(slots, *extra, DTYPE, "cpu", self.kv, False)
        self.requests = ReqToTokenPool(8, 512, "cpu", False)
        with _device_name("xpu" if mode == "IP" else "cpu"):
            self.radix = self.module.LMCRadixCache(
                CacheInitParams(False, self.requests, self.allocator, page_size),
                model_config=ModelConfig(model_path=str(write_model(folder / "model", tp_size))),
                tp_size=tp_size,
                rank=rank,
                tp_group=tp_group,
            )
        self.radix.device = torch.device("cpu")
        self.connector = self.radix.lmcache_connector
        self._count = 0

    def serve(self, prompt: list[int], answer: list[int], extra_key: str | None = None) -> Served:
        """One request from its match to its end; its KV is checked on every token and layer."""
        req = self.request(prompt, extra_key)
        resident, loaded, slots = self.match(req, prompt, extra_key)
        total = len(prompt) + len(answer) - 1
        need = total - len(slots)
        self.make_room(need)
        fresh = self.allocator.alloc(-(-need // self.page_size) * self.page_size)
        assert fresh is not None, "the pool is too small for this test"
        slots = torch.cat([slots, fresh[:need]])
        tokens = (prompt + answer)[:total]
        self.forward(tokens, slots, total - need)
        wrong = self.wrong_rows(tokens, slots)
        self.finish(req, prompt, answer, slots, resident + loaded)
        return Served(resident, loaded, wrong, total)

    def request(self, prompt: list[int], extra_key: str | None = None) -> Req:
        self._count += 1
        ids: Any = prompt if self.mode == "A" else array("q", prompt)
        return Req(f"r{self._count}", "", ids, SamplingParams(max_new_tokens=8), vocab_size=1000, extra_key=extra_key)

    def match(self, req: Req, prompt: list[int], extra_key: str | None = None) -> tuple[int, int, torch.Tensor]:
        """As the scheduler does: the resident and the loaded number of tokens, and the slots of both."""
        before = self._resident(prompt, extra_key)
        match = self.lookup(req, prompt, extra_key)
        slots, node = match.device_indices, match.last_device_node
        self.radix.inc_lock_ref(node)
        if match.host_hit_length:
            from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams

            self.radix.dec_lock_ref(node)
            fresh, node = self.radix.init_load_back(
                InitLoadBackParams(
                    best_match_node=match.best_match_node, host_hit_length=match.host_hit_length, req=req
                )
            )
            self.radix.inc_lock_ref(node)
            slots = torch.cat([slots, fresh])
        req.last_node, req.prefix_indices, req.cache_protected_len = node, slots, len(slots)
        assert len(slots) % self.page_size == 0, "SGLang shares whole pages only"
        return before, len(slots) - before, slots

    def lookup(self, req: Req, prompt: list[int], extra_key: str | None = None) -> Any:
        ids: Any = prompt[:-1] if self.mode == "A" else array("q", prompt[:-1])
        return self.radix.match_prefix(MatchPrefixParams(key=RadixKey(ids, extra_key), req=req))

    def forward(self, tokens: list[int], slots: torch.Tensor, start: int) -> None:
        """Compute the tokens from ``start`` on, in the order of an attention layer: write, then read the pool."""
        kv = true_kv(tokens, LAYERS, HEADS, DIM, DTYPE)
        for layer in range(LAYERS):
            self.kv.k_buffer[layer][slots[start:]] = kv[layer, 0, start:]
            self.kv.v_buffer[layer][slots[start:]] = kv[layer, 1, start:]
            self.kv.get_key_buffer(layer)
            self.kv.get_value_buffer(layer)

    def wrong_rows(self, tokens: list[int], slots: torch.Tensor) -> int:
        kv = true_kv(tokens, LAYERS, HEADS, DIM, DTYPE)
        held = torch.stack(
            [torch.stack([self.kv.k_buffer[i][slots], self.kv.v_buffer[i][slots]]) for i in range(LAYERS)]
        )
        return int((held != kv).any(-1).any(-1).sum())

    def finish(self, req: Req, prompt: list[int], answer: list[int], slots: torch.Tensor, prefix: int) -> None:
        total = len(slots)
        if req.req_pool_idx is None:
            req.req_pool_idx = self.requests.alloc([req])[0]
        self.requests.write((req.req_pool_idx, slice(0, total)), slots.to(torch.int32))
        req.output_ids = list(answer) if self.mode == "A" else array("q", answer)
        req.kv_committed_len = total
        req.cache_protected_len = prefix
        options = {} if self.mode == "A" else {"kv_len_to_handle": total}
        self.radix.cache_finished_req(req, **options)
        self.requests.free(req)

    def make_room(self, tokens: int) -> None:
        wanted = -(-tokens // self.page_size) * self.page_size
        if self.allocator.available_size() < wanted:
            self.radix.evict(EvictParams(num_tokens=wanted))

    def forget(self) -> None:
        """Empty SGLang's own cache and spoil every slot."""
        self.radix.evict(EvictParams(num_tokens=10**6))
        self.radix.reset()
        self.allocator.clear()
        for buffer in [*self.kv.k_buffer, *self.kv.v_buffer]:
            buffer.fill_(99)

    def unaccounted(self) -> int:
        """Slots that neither the allocator nor the tree has, after everything was served."""
        self.radix.evict(EvictParams(num_tokens=0))
        return self.kv.size - self.allocator.available_size() - self.radix.total_size()

    def locked(self) -> int:
        return int(self.radix.protected_size())

    def _resident(self, prompt: list[int], extra_key: str | None) -> int:
        ids: Any = prompt[:-1] if self.mode == "A" else array("q", prompt[:-1])
        key = RadixKey(ids, extra_key)
        return len(RadixCache.match_prefix(self.radix, MatchPrefixParams(key=key)).device_indices)


def _set_server_args(page_size: int, config_file: str) -> None:
    args = sgl_server_args.ServerArgs.__new__(sgl_server_args.ServerArgs)
    for field in dataclasses.fields(args):
        default = None
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        setattr(args, field.name, default)
    args.device, args.enable_lmcache, args.page_size = "cpu", True, page_size
    args.model_path = ""
    if hasattr(args, "lmcache_config_file"):
        args.lmcache_config_file = config_file
    try:
        from sglang.srt import runtime_context
    except ImportError:
        sgl_server_args.set_global_server_args_for_scheduler(args)
    else:
        runtime_context._CONTEXT.set_server_args(args)


def _radix_module() -> Any:
    torch.cuda.Stream = _Stream  # type: ignore[misc, assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, misc]
    import sglang.srt.mem_cache.storage.lmcache.lmc_radix_cache as module

    if hasattr(module, "create_device_stream"):
        module.create_device_stream = lambda device: _Stream()
        module.device_stream_context = lambda stream: contextlib.nullcontext()
    return module


@contextlib.contextmanager
def _device_name(name: str) -> Any:
    """Let the tree believe during its construction that its device is called ``name``."""
    init = RadixCache.__init__

    def named_init(self: Any, params: Any) -> None:
        init(self, params)
        if name == "xpu":
            self.device = _XpuInName()

    RadixCache.__init__ = named_init
    try:
        yield
    finally:
        RadixCache.__init__ = init


def environment(**settings: Any) -> None:
    """Set our configuration in the environment, as a user does."""
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        del os.environ[name]
    for key, value in settings.items():
        os.environ[f"LMCACHE_{key.upper()}"] = str(value)
