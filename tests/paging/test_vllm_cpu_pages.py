"""Against the kernel with which vLLM's CPU backend really writes its pages."""

from __future__ import annotations

import pytest
import torch

from lmcache.paging.block_connector import BlockConnector
from lmcache.paging.detect import PageHints, detect_layout
from lmcache.paging.make_connector import make_connector
from lmcache.paging.token_connector import TokenConnector
from lmcache.paging.verify import Writer, verify_layout
from tests.paging.conformance import slots_of
from tests.paging.worlds import new_chunk, random_bytes

pytestmark = pytest.mark.vllm

LAYERS, BLOCKS, HEADS = 3, 6, 3


@pytest.fixture(scope="module")
def write_kernel():  # type: ignore[no-untyped-def]
    """Of the build of vLLM's kernels, one of three, that fits this processor."""
    pytest.importorskip("vllm")
    ops = pytest.importorskip("vllm._custom_ops")
    return ops.cpu_attn_reshape_and_cache


class Engine:
    """Pages as vLLM 0.32 registers them, and its writer."""

    def __init__(
        self, kernel, isa: str, dtype: torch.dtype, block_size: int, dim: int, kv_cache_dtype: str = "auto"
    ) -> None:  # type: ignore[no-untyped-def]
        self.dtype, self.block_size, self.dim = dtype, block_size, dim
        self.page_dtype = dtype if kv_cache_dtype == "auto" else torch.uint8
        self.pages = random_bytes((LAYERS, BLOCKS, HEADS, block_size, 2 * dim), self.page_dtype)
        self.tensors = list(self.pages)
        hints = PageHints(block_size, HEADS, dim, backend="CPU_ATTN", engine="vllm")
        self.layout = detect_layout({f"layers.{i}": page for i, page in enumerate(self.tensors)}, hints)

        def write(layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
            halves = self.tensors[layer].view(BLOCKS, HEADS, block_size * 2, dim).chunk(2, dim=2)
            kernel(k, v, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=kv_cache_dtype)

        self.write: Writer = write

    def random_tokens(self, count: int) -> torch.Tensor:
        return torch.randn(count, HEADS, self.dim).to(self.dtype)

    def fill(self, tokens: int, slots: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        written = [(self.random_tokens(tokens), self.random_tokens(tokens)) for _ in range(LAYERS)]
        for layer, (k, v) in enumerate(written):
            self.write(layer, k, v, slots)
        return written


VEC = [("vec", 128, 64), ("vec", 32, 64), ("vec16", 16, 64), ("vec16", 32, 80)]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("isa", "block_size", "dim"), VEC)
def test_vec_pages(write_kernel, isa: str, block_size: int, dim: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    engine = Engine(write_kernel, isa, dtype, block_size, dim)
    before = engine.pages.view(torch.uint8).clone()
    assert verify_layout(engine.layout, engine.tensors, engine.write) is engine.layout
    assert torch.equal(engine.pages.view(torch.uint8), before)

    tokens = 2 * block_size + 5
    slots = slots_of([4, 1, 3], block_size, tokens)
    written = engine.fill(tokens, slots)
    by_token = TokenConnector(engine.layout, engine.tensors)
    chunk = new_chunk(by_token.spec(tokens))
    by_token.from_gpu(chunk, 0, tokens, slots)
    for layer, (k, v) in enumerate(written):
        assert torch.equal(chunk.tensor[layer, 0], k)
        assert torch.equal(chunk.tensor[layer, 1], v)

    by_page = make_connector(engine.layout, engine.tensors, 2 * block_size)
    assert isinstance(by_page, BlockConnector)
    pages = new_chunk(by_page.spec(2 * block_size))
    by_page.from_gpu(pages, 0, 2 * block_size, slots)
    k_view, v_view = by_page.chunk_views(pages)
    for layer, (k, v) in enumerate(written):
        assert torch.equal(k_view[layer].flatten(0, 1), k[: 2 * block_size])
        assert torch.equal(v_view[layer].flatten(0, 1), v[: 2 * block_size])


@pytest.fixture(scope="module")
def amx_write_kernel(write_kernel):  # type: ignore[no-untyped-def]
    """The AMX writer is plain code that needs no tiles, but vLLM's build for AVX2 leaves it out."""
    try:
        Engine(write_kernel, "amx", torch.float32, 32, 64).fill(1, torch.tensor([0]))
    except RuntimeError as error:
        pytest.skip(f"this build has no AMX writer: {error}")
    return write_kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp8_pages(write_kernel, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    for kv_cache_dtype in ("fp8_e4m3", "fp8_e5m2"):
        engine = Engine(write_kernel, "vec", dtype, 32, 64, kv_cache_dtype)
        try:
            engine.fill(1, torch.tensor([0]))
        except RuntimeError as error:
            pytest.skip(f"this CPU has no {kv_cache_dtype} writer: {error}")
        proved = verify_layout(engine.layout, engine.tensors, engine.write, dtype=dtype)
        assert proved is engine.layout


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_amx_pages_move_whole(amx_write_kernel, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    engine = Engine(amx_write_kernel, "amx", dtype, 32, 64)
    before = engine.pages.view(torch.uint8).clone()
    layout = verify_layout(engine.layout, engine.tensors, engine.write)
    assert layout.packed
    assert torch.equal(engine.pages.view(torch.uint8), before)

    slots = slots_of([4, 1], 32, 64)
    written = engine.fill(64, slots)
    connector = make_connector(layout, engine.tensors, 64)
    chunk = new_chunk(connector.spec(64))
    connector.from_gpu(chunk, 0, 64, slots)

    other = Engine(amx_write_kernel, "amx", dtype, 32, 64)
    expected = other.pages.clone()
    other.pages.copy_(expected)
    target = slots_of([0, 5], 32, 64)
    for layer, (k, v) in enumerate(written):
        other.write(layer, k, v, target)
    expected, other.pages[:] = other.pages.clone(), expected
    make_connector(layout, other.tensors, 64).to_gpu(chunk, 0, 64, target)
    assert torch.equal(other.pages.view(torch.uint8), expected.view(torch.uint8))


def test_packings_of_different_element_sizes_have_different_tags(amx_write_kernel) -> None:  # type: ignore[no-untyped-def]
    tags = set()
    for dtype in FLOATS:
        engine = Engine(amx_write_kernel, "amx", dtype, 32, 64)
        tags.add(verify_layout(engine.layout, engine.tensors, engine.write).page_tag)
    assert len(tags) == 3
