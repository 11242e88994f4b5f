"""Small positive definite matrices are inverted in place, whatever their sizes."""

from __future__ import annotations

import torch

from tests.kernels.needs_triton import DEVICE, require

require()

from lmcache.kernels.inverse import PANEL, invert  # noqa: E402 - needs Triton


def test_inverses_of_matrices_of_different_sizes() -> None:
    torch.manual_seed(0)
    sizes = [1, 15, 16, 17, 70, 96]
    size = -(-max(sizes) // PANEL) * PANEL
    matrices = torch.eye(size, device=DEVICE).repeat(len(sizes), 1, 1)
    expected = []
    for matrix, count in zip(matrices, sizes, strict=True):
        # As covariances are: much in common, and noise
        factor = torch.randn(count, 5, device=DEVICE)
        matrix[:count, :count] = 2 + factor @ factor.T + torch.eye(count, device=DEVICE)
        expected.append(torch.linalg.inv(matrix[:count, :count].double()))
    invert(matrices, torch.tensor(sizes, dtype=torch.int32, device=DEVICE))
    for matrix, count, inverse in zip(matrices, sizes, expected, strict=True):
        torch.testing.assert_close(matrix[:count, :count].double(), inverse, atol=1e-4, rtol=1e-3)
