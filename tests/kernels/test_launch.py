"""Which launches share a compiled variant. What a variant computes is shown by the kernels' own tests, on a GPU too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lmcache.kernels.launch import launch


@dataclass
class Param:
    name: str
    is_constexpr: bool = False
    do_not_specialize: bool = False


@dataclass
class Kernel:
    """As Triton's: ``kernel[grid](…)`` compiles and runs, and gives what runs again by ``compiled[grid](…)``."""

    params: list[Param]
    compiled: list[Any] = field(default_factory=list)
    again: list[Any] = field(default_factory=list)
    device_caches: Any = None
    __name__ = "kernel"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Again:
            self.compiled.append((grid, args, options))
            return Again(self)

        return run


@dataclass
class Again:
    kernel: Kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.again.append((grid, args))


@pytest.fixture
def kernel() -> Kernel:
    return Kernel([Param("X"), Param("count", do_not_specialize=True), Param("stride"), Param("SIZE", True)])


def test_the_second_launch_of_a_kind_needs_no_compiler(kernel: Kernel) -> None:
    x, y = torch.zeros(2, 64)
    launch(kernel, (3,), x, 5, 16, SIZE=8)
    launch(kernel, (4, 2), y, 6, 16, SIZE=8)
    assert kernel.compiled == [((3,), (x, 5, 16), {"SIZE": 8, "num_warps": 4})]
    assert kernel.again == [((4, 2, 1), (y.data_ptr(), 6, 16, 8))]


@pytest.mark.parametrize("change", ["stride", "type", "alignment", "constant", "warps"])
def test_what_triton_compiles_for_is_compiled_for(kernel: Kernel, change: str) -> None:
    x = torch.zeros(64)
    launch(kernel, (3,), x, 5, 16, SIZE=8)
    other = {"type": x.to(torch.float16), "alignment": x[1:]}.get(change, x)
    stride, size, warps = (
        17 if change == "stride" else 16,
        9 if change == "constant" else 8,
        8 if change == "warps" else 4,
    )
    launch(kernel, (3,), other, 5, stride, SIZE=size, num_warps=warps)
    assert len(kernel.compiled) == 2
    assert not kernel.again


def test_numbers_of_another_width_are_compiled_for(kernel: Kernel) -> None:
    x = torch.zeros(64)
    for count in (5, 2**31, 2**31 - 1, 2**40, -(2**31) - 1, -5):
        launch(kernel, (3,), x, count, 16, SIZE=8)
    assert [args[1] for _, args, _ in kernel.compiled] == [5, 2**31]
    assert [args[1] for _, args in kernel.again] == [2**31 - 1, 2**40, -(2**31) - 1, -5]


def test_what_is_left_out_is_compiled_for(kernel: Kernel) -> None:
    x, scale = torch.zeros(2, 64)
    for stride in (None, None, scale, scale, None):
        launch(kernel, (3,), x, 5, stride, SIZE=8)
    assert len(kernel.compiled) == 2
    assert [args[2] for _, args in kernel.again] == [None, scale.data_ptr(), None]


def test_constants_stand_last() -> None:
    with pytest.raises(ValueError, match="constants must be its last"):
        launch(Kernel([Param("SIZE", True), Param("X")]), (1,), torch.zeros(1), SIZE=8)
