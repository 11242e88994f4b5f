"""What the SGLang tests rely on: shims that compute what they stand in for, and a server that can be trusted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch

from demo.sglang.server import SHIMS
from tests.sglang.server import sglang_server


def rotary_shim() -> ModuleType:
    """By its path: where vLLM is installed, ``vllm`` is the real one."""
    spec = importlib.util.spec_from_file_location("rotary_shim", SHIMS / "vllm" / "_custom_ops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_shim(is_neox: bool, rotary_dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head_size, tokens = 8, 5
    angles = torch.outer(torch.arange(32.0), 10_000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim))
    positions = torch.tensor([0, 3, 31, 7, 7])
    query, key = (torch.randn(tokens, count * head_size).to(dtype) for count in heads)
    before = query.clone(), key.clone()
    rotary_shim().rotary_embedding(
        positions, query, key, head_size, torch.cat((angles.cos(), angles.sin()), 1), is_neox
    )
    for after, plain in zip((query, key), before, strict=True):
        rotated, plain = (rows.view(tokens, -1, head_size).float() for rows in (after, plain))
        assert torch.equal(rotated[..., rotary_dim:], plain[..., rotary_dim:])
        half = rotary_dim // 2
        for pair in range(half):
            first, second = (pair, pair + half) if is_neox else (2 * pair, 2 * pair + 1)
            turned = (
                torch.complex(plain[..., first], plain[..., second]) * torch.exp(1j * angles[positions, pair])[:, None]
            )
            torch.testing.assert_close(rotated[..., first], turned.real.to(dtype).float())
            torch.testing.assert_close(rotated[..., second], turned.imag.to(dtype).float())


@pytest.mark.sglang
def test_the_environment_is_the_locked_one() -> None:
    locked = (Path(__file__).parents[2] / "requirements" / "sglang-cpu.txt").read_text()
    spec = importlib.util.find_spec("sglang")  # not imported: this process has no shims
    assert f"sglang=={version('sglang')}\n" in locked
    assert spec is not None
    assert Path(spec.origin or "").is_relative_to(sys.prefix), "an installed SGLang, not a changed copy"


@pytest.mark.sglang
def test_torchvision_goes_with_this_torch() -> None:
    """Without the shim the import fails where torchvision's operators do not load; with it, wherever."""
    code = "import torchvision, torch; torch.ops.torchvision.nms"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SHIMS)}, check=True)


@pytest.mark.sglang
@pytest.mark.slow
def test_a_server_without_lmcache(tmp_path: Path) -> None:
    """The negative control of all that follows: nothing is reused once SGLang's own cache is empty."""
    with sglang_server(tmp_path, lmcache=False) as server:
        prompt = "The harbour has two piers. " * 8
        first = server.generate(prompt)
        again = server.generate(prompt)
        server.flush()
        flushed = server.generate(prompt)
        assert server.is_healthy()
    assert len(first.tokens) == 16
    assert (first.own, first.storage) == (0, 0)
    assert again.own == again.prompt_tokens - 1
    assert (flushed.own, flushed.storage) == (0, 0)
    assert first.tokens == again.tokens == flushed.tokens
