"""Launches of Triton's kernels with little work on the host.

A blend launches a dozen kernels a layer, and what Triton does before each, to find out which compiled variant the
arguments need, takes longer than many of the kernels run (33 µs against 16 with this, on the host of an H100).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Signature:
    """``compared``: for each argument, whether Triton chooses a variant by its value; ``constexprs``: names, in order.

    Of a tensor its type counts, and whether it lies at a multiple of 16 bytes.
    """

    compared: tuple[bool, ...]
    constexprs: tuple[str, ...]


_BEYOND_INT32 = 2**31
_signatures: dict[int, _Signature | None] = {}
_variants: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int | None = None,
    **constexprs: Any,
) -> None:
    """``kernel[grid](*args, **constexprs, …)``, on the current stream.

    ``args`` are all that are no constants, in the order of the kernel, which has its constants last. Numbers that
    differ from call to call belong into its ``do_not_specialize``: each value of another one is remembered. None is
    compiled for, as a constant is.
    """
    signature = _signatures.get(id(kernel), _UNKNOWN)
    if signature is _UNKNOWN:
        signature = _signatures[id(kernel)] = _signature(kernel)
    if signature is None:  # Triton's interpreter has no variants
        kernel[grid](*args, **constexprs, **_options(num_warps, num_stages))
        return
    constants = tuple([constexprs[name] for name in signature.constexprs])
    key: list[Any] = [id(kernel), args[0].device.index, num_warps, num_stages, constants]
    # Triton asks the driver about each tensor, but takes an address as it is.
    plain: list[Any] = []
    for arg, compared in zip(args, signature.compared, strict=True):
        if isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            plain.append(address)
            key += (arg.dtype, address % 16 == 0)
        else:
            plain.append(arg)
            if compared:
                key.append(arg)
            elif arg.__class__ is int and not -_BEYOND_INT32 <= arg < _BEYOND_INT32:
                key.append(_BEYOND_INT32)  # the first of them has decided how wide the argument is
    variant = _variants.get(tuple(key))
    if variant is None:
        _variants[tuple(key)] = kernel[grid](*args, **constexprs, **_options(num_warps, num_stages))
        return
    variant[(*grid, 1, 1)[:3]](*plain, *constants)


_UNKNOWN = _Signature((), ())


def _signature(kernel: Any) -> _Signature | None:
    params = getattr(kernel, "params", None)
    if params is None or not hasattr(kernel, "device_caches"):
        return None
    constexprs = [param.is_constexpr for param in params]
    if constexprs != sorted(constexprs):
        raise ValueError(f"{kernel.__name__}: constants must be its last parameters")
    return _Signature(
        tuple(not param.do_not_specialize for param in params if not param.is_constexpr),
        tuple(param.name for param in params if param.is_constexpr),
    )


def _options(num_warps: int, num_stages: int | None) -> dict[str, int]:
    return {"num_warps": num_warps} if num_stages is None else {"num_warps": num_warps, "num_stages": num_stages}
