from __future__ import annotations

import pytest
import torch

from lmcache.paging.detect import PageHints, UnknownLayoutError, detect_layout, detect_pool_layout
from tests.paging.worlds import WHOLE_PAGES, WORLDS, Sizes

HINTS = PageHints(block_size=16, num_kv_heads=2, head_dim=8, backend="FLASH_ATTN", engine="vllm 0.32.0")

NAMES = {
    "cpu_vec": "vllm-cpu-vec",
    "kv_second_nhd": "kv-second-nhd",
    "kv_second_hnd": "kv-second-hnd",
    "kv_first": "kv-first-nhd",
    "kv_last_nhd": "kv-last-nhd",
    "kv_last_hnd": "kv-last-hnd",
    "kv_last_blocks_outermost": "kv-last-hnd",
    "kv_last_heads_outermost": "kv-last-hnd",
    "mla_3d": "mla",
    "mla_4d": "mla",
    "plain": "plain",
    "kv_pools": "kv-pools",
    "mla_pool": "mla-pool",
}


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_known_layouts(name: str) -> None:
    sizes = Sizes()
    layout = WORLDS[name](sizes).layout
    assert layout.name == NAMES[name]
    assert (layout.num_layers, layout.num_blocks, layout.block_size) == (3, 6, 4)
    assert layout.head_dim == sizes.dim
    assert layout.dtype == sizes.dtype
    assert (layout.page is not None) == (name in WHOLE_PAGES)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", sorted(WORLDS.keys() - {"kv_first", "kv_second_nhd", "kv_second_hnd"}))
def test_very_few_blocks_are_not_mistaken(name: str, blocks: int) -> None:
    layout = WORLDS[name](Sizes(blocks=blocks)).layout
    assert (layout.name, layout.num_blocks) == (NAMES[name], blocks)
    assert (layout.page is not None) == (name in WHOLE_PAGES) or blocks == 1


def refused(message: str, *tensors: object, hints: PageHints = HINTS) -> str:
    with pytest.raises(UnknownLayoutError, match=message) as error:
        detect_layout({f"layers.{i}": tensor for i, tensor in enumerate(tensors)}, hints)  # type: ignore[misc]
    return str(error.value)


def test_the_refusal_names_what_was_seen_and_what_is_known() -> None:
    message = refused("No known layout fits", torch.zeros(5, 7, 16, 2, 8))
    for part in (
        "'layers.0'",
        "shape (5, 7, 16, 2, 8)",
        "strides (1792, 256, 16, 8, 1)",
        "float32 on cpu",
        "backend=FLASH_ATTN",
        "vllm 0.32.0",
        "num_kv_heads=2",
        "[B, 2, N, H, D]",
    ):
        assert part in message


@pytest.mark.parametrize(
    "shape",
    [
        (5, 2, 16, 24),  # neither D nor 2D: such as fp8 with scales in the page
        (5, 3, 16, 16),  # other heads
        (5, 16, 8),  # MLA with two heads
        (10, 16),
        (5,),
    ],
)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    refused("No known layout fits", torch.zeros(shape))


def test_pages_of_a_cpu_backend_must_be_dense_inside() -> None:
    hints = PageHints(16, 2, 8, backend="CPU_ATTN")
    refused("No known layout fits", torch.zeros(5, 16, 2, 16).transpose(1, 2), hints=hints)
    refused("No known layout fits", torch.zeros(5, 2, 16, 2, 8), hints=hints)


def test_kv_last_without_a_backend_could_be_two_things() -> None:
    refused("No known layout fits.*backend=not given", torch.zeros(5, 2, 16, 16), hints=PageHints(16, 2, 8))


def test_two_blocks_with_k_and_v_are_ambiguous() -> None:
    refused("More than one known layout fits", torch.zeros(2, 2, 16, 2, 8))


def test_blocks_that_do_not_divide_the_engines_are_refused() -> None:
    refused("Pages of 24 tokens .* do not divide", torch.zeros(5, 2, 24, 2, 8))


def test_kernels_may_use_smaller_blocks_than_the_block_table() -> None:
    layout = detect_layout({"a": torch.zeros(10, 2, 8, 2, 8)}, HINTS)
    assert (layout.block_size, layout.num_slots) == (8, 80)


def test_layers_must_be_alike() -> None:
    a, b = torch.zeros(5, 2, 16, 2, 8), torch.zeros(5, 2, 16, 2, 8)
    message = refused("Layers with different KV pages", a, a, b.half())
    assert "'layers.2'" in message
    refused("Layers with different KV pages", a, torch.zeros(6, 2, 16, 2, 8))
    refused("Layers with different KV pages", a, torch.zeros(5, 2, 2, 16, 8).transpose(2, 3))


def test_mamba_state_is_refused() -> None:
    refused(r"'layers.1' registered a list instead of one tensor.*Mamba", torch.zeros(5, 2, 16, 2, 8), [torch.zeros(3)])


def test_nothing_empty_and_odd_dtypes() -> None:
    refused("registered no KV pages")
    refused("are empty", torch.zeros(0, 2, 16, 2, 8))
    refused("known dtypes are bfloat16", torch.zeros(5, 2, 16, 2, 8, dtype=torch.float64))


class TestPools:
    hints = PageHints(block_size=4, num_kv_heads=2, head_dim=8)

    def pools(self, *shape: int, count: int = 2) -> list[torch.Tensor]:
        return [torch.zeros(shape) for _ in range(count)]

    def test_different_head_dims_of_k_and_v(self) -> None:
        with pytest.raises(UnknownLayoutError, match=r"V pools must be \[slots, 2, 8\].*different head dims are not"):
            detect_pool_layout(self.pools(12, 2, 8), self.pools(12, 2, 4), self.hints)

    def test_slots_must_make_whole_pages(self) -> None:
        with pytest.raises(UnknownLayoutError, match="13 slots are no whole number of pages of 4"):
            detect_pool_layout(self.pools(13, 2, 8), self.pools(13, 2, 8), self.hints)

    def test_k_and_v_must_match(self) -> None:
        with pytest.raises(UnknownLayoutError, match="2 K pools were registered, but 3 V pools"):
            detect_pool_layout(self.pools(12, 2, 8), self.pools(12, 2, 8, count=3), self.hints)
        with pytest.raises(UnknownLayoutError, match="K and V pools differ"):
            detect_pool_layout(self.pools(12, 2, 8), self.pools(16, 2, 8), self.hints)
