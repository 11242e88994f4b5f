"""mask_to_indices, indices_to_mask, create_index."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lmcache.blend.executor import create_index, indices_to_mask, mask_to_indices


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8])
def test_indices_of_a_mask(dtype):
    indices = mask_to_indices(torch.tensor([1, 0, 0, 1, 1], dtype=dtype))
    assert indices.tolist() == [0, 3, 4]
    assert indices.dtype == torch.int64


def test_anything_but_zero_is_set():
    assert mask_to_indices(torch.tensor([0, 2, -1, 0])).tolist() == [1, 2]


def test_a_mask_of_indices():
    mask = indices_to_mask(torch.tensor([4, 0, 4], dtype=torch.int32), 5)
    assert mask.tolist() == [1, 0, 0, 0, 1]
    assert mask.dtype == torch.int64
    assert mask.device.type == "cpu"
    assert indices_to_mask(torch.tensor([], dtype=torch.int64), 2).tolist() == [0, 0]
    assert indices_to_mask(torch.tensor([], dtype=torch.int64), 0).tolist() == []


@given(st.lists(st.booleans()))
def test_there_and_back(mask):
    mask = torch.tensor(mask, dtype=torch.bool)
    assert torch.equal(indices_to_mask(mask_to_indices(mask), len(mask)) != 0, mask)


@pytest.mark.parametrize(("shape", "dim"), [((6,), 0), ((6, 2), 0), ((2, 6, 3), 1), ((2, 6, 3), -2), ((2, 3, 6), 2)])
def test_an_index_along_one_dimension(shape, dim):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    rows = torch.tensor([5, 1, 2])
    index = create_index(tensor.dim(), dim, rows)
    assert isinstance(index, tuple)
    assert len(index) == tensor.dim()
    assert torch.equal(tensor[index], tensor.index_select(dim, rows))
    assert [entry for entry in index if isinstance(entry, slice)] == [slice(None)] * (tensor.dim() - 1)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        mask_to_indices(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\[0, 3\), got 1 to 3"):
        indices_to_mask(torch.tensor([1, 3]), 3)
    with pytest.raises(ValueError, match="got -1"):
        indices_to_mask(torch.tensor([-1]), 3)
    for dim in (2, -3):
        with pytest.raises(ValueError, match=f"target_dim={dim}"):
            create_index(2, dim, torch.tensor([0]))
