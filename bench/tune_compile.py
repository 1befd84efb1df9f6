"""Compiles a launch of a Triton kernel as its first call would, without a GPU, and reads what the code needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from .tune_log import Resources


class _NoGpu:
    """Stands for Triton's driver where nothing is launched."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_launch(kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], capability: int) -> Resources:
    """Compile what `kernel[grid](*arguments, **options)` would: that call then finds it in Triton's cache.

    Nothing can be launched in this process any more. Not for a process in which Triton interprets.

    Args:
        kernel: a function under `triton.jit`.
        arguments: of the kernel; tensors may be on the device "meta", and count as aligned to 16 bytes there.
        options: compile-time constants, and options of the compiler such as num_warps.
        capability: compute capability of the GPU times ten.
    """
    triton.runtime.driver.set_active(_NoGpu(capability))
    code = kernel.run(*arguments, grid=(1,), warmup=True, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    return Resources(kernel.__name__, registers, stack, code.metadata.shared, code.metadata.num_warps)
