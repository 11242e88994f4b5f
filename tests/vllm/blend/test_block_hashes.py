"""The names of a blended request's blocks, as vLLM derives them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from lmcache.integration.vllm.blend.block_hashes import SaltedBlockHashes

pytestmark = pytest.mark.vllm

SIZE = 8


def request(num_tokens: int) -> Request:
    init_none_hash(sha256)
    return Request(
        request_id="one",
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(max_tokens=100),
        pooling_params=None,
        block_hasher=get_request_block_hasher(SIZE, sha256),
    )


@given(num_tokens=st.integers(SIZE, 60), generated=st.integers(0, 40), data=st.data())
def test_only_blocks_of_exact_tokens_can_be_found_by_others(
    num_tokens: int, generated: int, data: st.DataObject
) -> None:
    """Also where the blend fits into the last block of a prompt, which has a name only once it is full."""
    exact = data.draw(st.integers(0, num_tokens - 1))
    plain, blended = request(num_tokens), request(num_tokens)
    salted = SaltedBlockHashes()
    salted.apply(blended, exact, SIZE)
    for one in (plain, blended):
        one.append_output_token_ids(list(range(1000, 1000 + generated)))
    after_preemption = data.draw(st.integers(0, num_tokens - 1))
    salted.apply(blended, after_preemption, SIZE)

    assert len(plain.block_hashes) == len(blended.block_hashes)
    shared = [index for index, name in enumerate(plain.block_hashes) if name in blended.block_hashes]
    whole = min(exact, after_preemption) // SIZE
    assert all(index < whole for index in shared)
    # At most the last block of the prompt loses its name although it is exact.
    assert len(shared) >= min(whole, num_tokens // SIZE - 1)


def test_a_request_finds_its_own_blocks_again() -> None:
    blended = request(40)
    salted = SaltedBlockHashes()
    salted.apply(blended, 16, SIZE)
    names = list(blended.block_hashes)
    salted.apply(blended, 32, SIZE)
    assert blended.block_hashes == names
