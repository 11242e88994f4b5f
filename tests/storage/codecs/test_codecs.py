"""What every codec does, what each promises of its error, and that hostile bytes are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("zstandard")

from lmcache.config import LMCacheEngineConfig
from lmcache.memory.memory_obj import KVSpec
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.codecs import CODEC_NAMES, make_codec
from lmcache.storage.codecs.interface import CodecError

PACKING = [name for name in CODEC_NAMES if name != "raw"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

shapes = st.tuples(*(st.integers(1, limit) for limit in (4, 2, 40, 3, 9)))


def chunk(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, KVSpec]:
    """Keys and values as models have them: channels of their own sizes, neighbours alike."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=random)
    drift = torch.randn(shape, generator=random).cumsum(2) * 0.1
    channels = torch.randn((*shape[:2], 1, *shape[3:]), generator=random).exp()
    tensor = ((noise * 0.3 + drift) * channels * scale).to(dtype)
    return tensor, KVSpec(shape, dtype, TOKEN_MAJOR, shape[2])


@pytest.mark.parametrize("name", PACKING)
@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_what_comes_back_is_as_close_as_promised(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float
) -> None:
    codec = make_codec(name)
    tensor, spec = chunk(shape, dtype, seed, scale)
    before = tensor.clone()
    packed = codec.encode(tensor, spec)
    assert torch.equal(tensor, before)
    if packed is None:
        return
    assert len(packed) <= codec.max_bytes(spec)
    back = torch.full_like(tensor, math.nan)
    codec.decode(memoryview(packed), back, spec)
    if codec.is_exact:
        assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
        return
    error = (back.double() - tensor.double()).abs()
    assert (error <= allowed(name, tensor) * (1 + 1e-6)).all()


def allowed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The bounds of the modules' docstrings, with the rounding to the dtype."""
    exact = tensor.double().abs()
    rounding = torch.finfo(tensor.dtype).eps * 1.1 * exact + torch.finfo(tensor.dtype).tiny
    if name == "fp8":
        flat = exact.reshape(-1)
        groups = torch.nn.functional.pad(flat, (0, -len(flat) % 128)).view(-1, 128)
        largest = groups.amax(1, keepdim=True).expand_as(groups).reshape(-1)[: len(flat)].view_as(exact)
        return torch.maximum(exact * 2.0**-4, largest * 2.0**-17) + rounding
    layers = tensor.shape[0]
    steps = torch.tensor([(127, 31, 15)[3 * layer // layers] for layer in range(layers)]).view(-1, 1, 1, 1, 1)
    return exact.amax(2, keepdim=True) / (2 * steps) + rounding + exact.amax(2, keepdim=True) * 2.0**-8


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_a_number_is_kept_or_left_alone(name: str, value: float) -> None:
    codec = make_codec(name)
    tensor, spec = chunk((2, 2, 16, 2, 8), torch.bfloat16, 0)
    tensor[1, 0, 3, 1, 2] = value
    packed = codec.encode(tensor, spec)
    if packed is not None:
        back = torch.empty_like(tensor)
        codec.decode(memoryview(packed), back, spec)
        assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("name", PACKING)
def test_zeros(name: str) -> None:
    codec = make_codec(name)
    spec = KVSpec((3, 2, 64, 2, 32), torch.bfloat16, TOKEN_MAJOR, 64)
    packed = codec.encode(torch.zeros(spec.shape, dtype=spec.dtype), spec)
    assert packed is not None
    back = torch.ones(spec.shape, dtype=spec.dtype)
    codec.decode(memoryview(packed), back, spec)
    assert not back.any()


@pytest.mark.parametrize("name", PACKING)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_hostile_bytes_are_refused_or_give_some_numbers_and_never_more(name: str, data: st.DataObject) -> None:
    codec = make_codec(name)
    tensor, spec = chunk((3, 2, 32, 2, 16), torch.bfloat16, 1)
    packed = bytearray(codec.encode(tensor, spec) or b"")
    how = data.draw(st.sampled_from(["flip", "cut", "longer", "noise"]))
    if how == "flip":
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del packed[data.draw(st.integers(0, len(packed) - 1)) :]
    elif how == "longer":
        packed += data.draw(st.binary(min_size=1, max_size=100))
    else:
        packed = bytearray(data.draw(st.binary(max_size=3000)))
    back = torch.zeros_like(tensor)
    try:
        codec.decode(memoryview(packed), back, spec)
    except CodecError:
        assert how in ("flip", "cut", "longer", "noise")


def test_a_frame_that_would_unpack_to_more_than_the_chunk_is_refused() -> None:
    import zstandard

    spec = KVSpec((1, 2, 16, 1, 64), torch.bfloat16, TOKEN_MAJOR, 16)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    with pytest.raises(CodecError, match="not that of the chunk"):
        make_codec("zstd").decode(memoryview(bomb), torch.empty(spec.shape, dtype=spec.dtype), spec)
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    streamed = unsaid.compress(bytes(1 << 28)) + unsaid.flush()
    with pytest.raises(CodecError):
        make_codec("zstd").decode(memoryview(streamed), torch.empty(spec.shape, dtype=spec.dtype), spec)


def test_only_what_a_codec_understands_is_given_to_it() -> None:
    pages = KVSpec((2, 4, 2, 16, 8), torch.bfloat16, "pages of some engine", 64)
    bytes_ = KVSpec((2, 2, 16, 2, 8), torch.uint8, TOKEN_MAJOR, 16)
    assert not make_codec("delta").takes(pages)
    assert make_codec("fp8").takes(pages)
    assert make_codec("zstd").takes(pages)
    assert not make_codec("fp8").takes(bytes_)
    assert not make_codec("delta").takes(bytes_)


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="must be one of raw, zstd, fp8, delta"):
        make_codec("gzip")


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_the_configuration_knows_which_are_exact(name: str) -> None:
    config = LMCacheEngineConfig(remote_url="redis://host", remote_codec=name)
    assert config.inexact_codec == ("" if make_codec(name).is_exact else name)
    assert LMCacheEngineConfig(remote_codec=name, disk_codec=name).inexact_codec == ""
    config = LMCacheEngineConfig(local_disk="/kv", disk_codec=name)
    assert config.inexact_codec == ("" if make_codec(name).is_exact else name)
    both = LMCacheEngineConfig(local_disk="/kv", disk_codec=name, remote_url="redis://host", remote_codec="fp8")
    assert both.inexact_codec == ("delta+fp8" if name == "delta" else "fp8")


@pytest.mark.parametrize("name", ["fp8", "delta"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_stay_finite(name: str, dtype: torch.dtype) -> None:
    spec = KVSpec((3, 2, 16, 1, 8), dtype, TOKEN_MAJOR, 16)
    numbers = torch.full(spec.shape, torch.finfo(dtype).max, dtype=dtype)
    packed = make_codec(name).encode(numbers, spec)
    if packed is not None:
        back = torch.empty_like(numbers)
        make_codec(name).decode(memoryview(packed), back, spec)
        assert back.isfinite().all()
