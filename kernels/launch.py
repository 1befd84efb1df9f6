"""Launches a Triton kernel in a few microseconds of the host's time, where `kernel[grid](...)` takes tens of them.

At every launch Triton binds the arguments to the kernel's signature, looks the code up by what it specialises on, and
compares each global constant that the kernel uses: about 60 us for a kernel of this package with Triton 3.6, and a
forward pass launches three. Here what the shape of a call decides is kept in a `Launch`, with the code that was
compiled for it, which is run again for tensors and shapes of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

_ON_HIP = torch.version.hip is not None
_codes: dict[tuple, dict[tuple, CompiledKernel]] = {}  # of all launches, which differ in numbers and grid


class Launch:
    """A kernel and all arguments but the tensors; called with these, as `kernel[grid](...)` on the current CUDA device
    and stream.

    Compiled code is found again by all that Triton specialises on: `constants` and `options`; of a number whether it is
    a float, 1, divisible by 16, within 32 bits; of every tensor the dtype, whether it starts at a multiple of 16 bytes,
    and whether it is there; the device. Launches for other shapes thus share it. Environment variables and knobs of
    Triton count when a kernel is compiled, and not after; hooks around launches see the first one alone.

    Args:
        kernel: a function under `triton.jit`. Anything else, such as a kernel in the interpreter, is called as above.
        grid: up to three sizes.
        numbers: int and float arguments of the kernel, which follow its tensors.
        constants: every compile-time constant of the kernel by name, in order.
        options: of the compiler, such as num_warps.
    """

    __slots__ = ("_codes", "_sizes", "_tail", "constants", "grid", "kernel", "numbers", "options")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: Sequence[int | float],
        constants: dict[str, Any],
        **options: int,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants, self.options = kernel, grid, numbers, constants, options
        self._codes = _codes.setdefault(
            (getattr(kernel, "fn", kernel), *constants.items(), *options.items(), *map(_kind, numbers)), {}
        )
        self._sizes = (*grid, 1, 1)[:3]
        self._tail = (*numbers, *constants.values())  # nothing reads the constants, but their places count

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch with the kernel's tensors in order; the first is not None, all are on the current device."""
        if not isinstance(self.kernel, JITFunction) or _ON_HIP:  # for HIP Triton specialises on more
            self._by_triton(tensors)
            return
        device = tensors[0].device
        kinds: list[Any] = [device]
        pointers: list[int | None] = []
        bits = 0
        for x in tensors:
            if x is None:
                kinds.append(None)
                pointers.append(None)
            else:
                pointer = x.data_ptr()
                kinds.append(x.dtype)
                pointers.append(pointer)
                bits |= pointer
        if bits % 16:
            kinds += [pointer is not None and pointer % 16 == 0 for pointer in pointers]
        key = tuple(kinds)
        code = self._codes.get(key)
        if code is None:
            code = self._by_triton(tensors)
            if isinstance(code, CompiledKernel):  # None where a hook of Triton took over
                self._codes[key] = code
            return
        # As the last lines of `JITFunction.run`.
        stream = driver.active.get_current_stream(device.index)
        handles = (code.function, code.packed_metadata)
        code.run(*self._sizes, stream, *handles, None, None, None, *pointers, *self._tail)

    def _by_triton(self, tensors: Sequence[Tensor | None]) -> Any:
        return self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)


def _kind(number: int | float) -> Any:
    """What Triton tells apart of a number."""
    return float if type(number) is float else (number == 1, number % 16 == 0, -(2**31) <= number < 2**31)
