"""Where the requests of a batch begin and end."""

from __future__ import annotations

import pytest
import torch

from lmcache.blend.request_spans import request_spans


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_range_a_request(dtype):
    assert request_spans(torch.tensor([0, 3, 3, 8], dtype=dtype), 8) == [(0, 3), (3, 3), (3, 8)]


def test_a_request_of_no_tokens():
    assert request_spans(torch.tensor([0, 0]), 0) == [(0, 0)]


@pytest.mark.parametrize("bounds", [[1, 8], [0, 7], [0, 9], [0, 5, 4, 8], [0, -1, 8]])
def test_what_does_not_cover_the_batch_is_named(bounds):
    with pytest.raises(ValueError, match=r"query_start_loc=\[.*8") as caught:
        request_spans(torch.tensor(bounds), 8)
    assert str(bounds) in str(caught.value)


@pytest.mark.parametrize(
    "bounds", [torch.tensor([0]), torch.tensor(0), torch.tensor([[0, 8]]), torch.tensor([0.0, 8.0])]
)
def test_what_is_no_list_of_bounds_is_named(bounds):
    with pytest.raises(ValueError, match="query_start_loc: expected integers"):
        request_spans(bounds, 8)
