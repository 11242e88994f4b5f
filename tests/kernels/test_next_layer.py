"""Offsets go on from layer to layer."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.needs_triton import DEVICE, require

require()

from lmcache.kernels.next_layer import layer_counter, next_layer  # noqa: E402 - needs Triton


@pytest.mark.parametrize("num_rows", [1, 256, 1000])
def test_each_call_goes_on_by_a_layer(num_rows: int) -> None:
    torch.manual_seed(0)
    first, distances = torch.randint(1 << 40, (num_rows,)), torch.randint(-(1 << 40), 1 << 40, (5,))
    counter, offsets = layer_counter(num_rows, DEVICE), torch.zeros(num_rows + 1, dtype=torch.int64, device=DEVICE)
    for begin in (0, 3, 1):
        counter.fill_(begin)
        for layer in range(begin, 5):
            next_layer(first.to(DEVICE), distances.to(DEVICE), counter, offsets[:-1])
            assert torch.equal(offsets[:-1].cpu(), first + distances[layer])
    assert int(offsets[-1]) == 0, "nothing behind them is written"
