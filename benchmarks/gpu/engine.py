"""A vLLM in this process: timed requests, and a defined state between them."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.cache_server import start_server
from benchmarks.gpu.fast_core import fast_core
from benchmarks.gpu.setup import CPU_ENVIRONMENT, ENVIRONMENT, GRAPHS, SERVER, Setup, transfer_options

MAX_SETTLE_SECONDS, MAX_RESET_SECONDS = 60.0, 2.0


@dataclass(frozen=True)
class Answer:
    """``cached_tokens`` of the prompt were not computed, by vLLM's account; ``report`` is what ours says.
    ``loop_milliseconds``: how fast the host was just before, see :mod:`benchmarks.gpu.fast_core`."""

    seconds: float
    loop_milliseconds: float
    tokens: list[int]
    cached_tokens: int
    report: dict[str, Any] | None


class Engine:
    """Real vLLM with random weights. Made in a process of its own, since it never gives its memory back."""

    def __init__(self, setup: Setup, model: Path | None = None, **options: Any) -> None:
        """``model``: a folder, to be used with its own weights and tokenizer; ``options``: more of vLLM's."""
        socket = start_server(setup.host_gib) if setup.variant == SERVER else None
        os.environ.update(ENVIRONMENT)
        if setup.tiny:
            os.environ.update(CPU_ENVIRONMENT)
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self.setup = setup
        start = time.perf_counter()
        if model is None:
            folder = Path(tempfile.mkdtemp(prefix="model-"))
            (folder / "config.json").write_text(json.dumps(setup.shape))
            options = {"load_format": "dummy", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.7} | options
        if setup.tiny:
            options.pop("gpu_memory_utilization", None)
        transfer = transfer_options(setup, socket)
        self.llm = LLM(
            model=str(model or folder),
            max_model_len=setup.max_tokens,
            max_num_batched_tokens=setup.batched_tokens,
            enable_prefix_caching=setup.prefix_caching,
            kv_cache_dtype=setup.kv_cache_dtype,
            kv_transfer_config=None if transfer is None else KVTransferConfig(**transfer),
            **GRAPHS[setup.graphs],
            **options,
        )
        if model is None:
            self.llm.apply_model(_draw_weights)
        self.start_seconds = time.perf_counter() - start

    @property
    def core(self) -> Any:
        """vLLM's ``LLMEngine``: ``add_request`` and ``step``."""
        return self.llm.llm_engine

    def sampling(self, max_tokens: int = 1, params: dict[str, Any] | None = None) -> Any:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": params} if params else None
        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=extra)

    def ask(self, tokens: Sequence[int], params: dict[str, Any] | None = None, max_tokens: int = 1) -> Answer:
        """Ask alone, and time it from the call to the last of ``max_tokens``."""
        prompt, sampling = [{"prompt_token_ids": list(tokens)}], self.sampling(max_tokens, params)
        synchronize()
        with fast_core() as loop_milliseconds:
            start = time.perf_counter()
            (output,) = self.llm.generate(prompt, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
        return Answer(
            seconds,
            loop_milliseconds,
            list(output.outputs[0].token_ids),
            output.num_cached_tokens or 0,
            report_of(output),
        )

    def fill(self, draw: Callable[[int], list[int]], length: int) -> None:
        """Have a connector's host memory pinned and full, as it is in a server that runs for a while, by prompts of
        ``length`` tokens that ``draw`` gives."""
        for _ in range(math.ceil(self.setup.host_tokens / length)):
            self.ask(draw(length))
            self.forget()

    @property
    def has_work(self) -> bool:
        """Whether a step would do something, for a request or for a connector that still moves bytes."""
        inner = self.core.engine_core.engine_core
        # With asynchronous scheduling a batch may be under way that no request waits for.
        return bool(inner.scheduler.has_requests() or inner.batch_queue)

    def settle(self) -> None:
        """Let every store end: ours and vLLM's are under way when the first token is there."""
        end = time.monotonic() + MAX_SETTLE_SECONDS
        while self.has_work:
            if time.monotonic() > end:
                raise RuntimeError(f"vLLM still has work after {MAX_SETTLE_SECONDS:.0f} s without a request")
            self.core.step()
        synchronize()

    def forget(self) -> None:
        """Empty vLLM's own prefix cache; a connector's store stays.

        Raises:
            RuntimeError: vLLM refused, so a reload would not be one.
        """
        end = time.monotonic() + MAX_RESET_SECONDS
        self.settle()
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > end:
                raise RuntimeError("vLLM did not reset its prefix cache: blocks are still in use")
            self.core.step()


def report_of(output: Any) -> dict[str, Any] | None:
    """Our report, without its long lists."""
    report: dict[str, Any] | None = (output.kv_transfer_params or {}).get("lmcache")
    if report is None or not report.get("blend"):
        return report
    blend = {key: value for key, value in report["blend"].items() if key not in ("recomputed", "segments")}
    return {**report, "blend": blend}


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def started(engine: Engine) -> dict[str, Any]:
    """The first thing that a variant's process tells."""
    return {
        "machine": machine(),
        "start_seconds": engine.start_seconds,
        "setup": asdict(engine.setup),
        "kv_bytes_per_token": engine.setup.kv_bytes_per_token,
        "pinned_copy_gb_s": pinned_copy(),
    }


def pinned_copy() -> dict[str, float]:
    """GB/s of plain copies of 512 MiB between pinned host memory and the GPU; nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    host = torch.zeros(512 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros_like(host, device="cuda")
    speeds: dict[str, float] = {}
    for name, target, source in (("host to device", device, host), ("device to host", host, device)):
        taken = []
        for _ in range(5):
            synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            synchronize()
            taken.append(time.perf_counter() - start)
        speeds[name] = host.numel() / min(taken) / 1e9
    del host, device
    torch.cuda.empty_cache()
    return speeds


def machine() -> str:
    """The machine and the versions in one line."""
    import torch
    import vllm

    from lmcache.bench.machine import describe_machine

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{device}, vLLM {vllm.__version__}, torch {torch.__version__}, {describe_machine()}"


def _draw_weights(model: Any) -> None:
    """vLLM's dummy weights are so small that attention sees nothing: draw them as a fresh model's."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
