"""Launches a Triton kernel in a few microseconds of the host's time, where `kernel[grid](...)` takes tens of them.

At every launch Triton binds the arguments to the kernel's signature, looks the code up by what it specialises on, and
compares each global constant that the kernel uses: about 60 us for a kernel of this package with Triton 3.6, and a
forward pass launches three. Here the code that a launch compiled is kept, and run again by later launches for which
Triton would choose the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

_ON_HIP = torch.version.hip is not None
_compiled: dict[tuple, CompiledKernel] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Tensor | int | float | None],
    constants: Mapping[str, Any],
    **options: int,
) -> None:
    """As `kernel[grid](*arguments, **constants, **options)`, on the current CUDA device and stream.

    Compiled code is found again by all that Triton specialises on: dtype and 16-byte alignment of a tensor; of an int
    whether it is 1, divisible by 16, within 32 bits; which arguments are None, float, int or tensor; `constants` and
    `options`; the device. Environment variables and knobs of Triton count when a kernel is compiled, and not after;
    hooks around launches see the first one alone.

    Args:
        kernel: a function under `triton.jit`. Anything else, such as a kernel in the interpreter, is called as above.
        grid: up to three sizes.
        arguments: of the kernel, in order, up to its compile-time constants; the first is a tensor. All tensors are on
            the current device.
        constants: every compile-time constant of the kernel by name; hashable values.
        options: of the compiler, such as num_warps.
    """
    if not isinstance(kernel, JITFunction) or _ON_HIP:  # for HIP Triton specialises on more
        kernel[grid](*arguments, **constants, **options)
        return
    device = arguments[0].device
    key = [kernel.fn, device, *constants, *constants.values(), *options, *options.values()]
    values = []  # for the launcher a pointer is its address
    for x in arguments:
        kind = type(x)
        if x is None or kind is float:
            key.append(kind)
        elif kind is int:
            key.append((x == 1, x % 16 == 0, -(2**31) <= x < 2**31))
        else:
            key.append(x.dtype)
            x = x.data_ptr()
            key.append(x % 16 == 0)
        values.append(x)
    key = tuple(key)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*arguments, **constants, **options)
        if isinstance(compiled, CompiledKernel):  # None where a hook of Triton took over
            _compiled[key] = compiled
        return
    # As the last lines of `JITFunction.run`. Nothing reads the constants, but their places count.
    sizes = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device.index)
    code = (compiled.function, compiled.packed_metadata)
    compiled.run(*sizes, stream, *code, None, None, None, *values, *constants.values())
