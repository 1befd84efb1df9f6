"""Which configuration of the chunk kernels runs a given shape: a short table, chosen by hand from measurements.

Every entry ran on an H200 with the ptxas that Triton 3.6.0 bundles (12.8.93), which miscompiles some others, and
matched the float64 recurrence there. Where a GPU's shared memory cannot hold the stages, fewer are used.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

# Left free: Triton keeps barriers and the exchange of register layouts there too.
SHARED_MEMORY_MARGIN = 4096
STATE_SLICE = 64  # columns of K that the scans multiply at a time: SLICE of pairs.py, without Triton
MAX_HEAD_DIM_K = 256


@dataclass(frozen=True)
class KernelConfig:
    """How the chunk kernels are launched.

    Attributes:
        block_v: value columns a program of the scan, a power of two from 16.
        scan_warps, scan_stages: warps a program and chunks in flight of the scan.
        prepare_warps: warps a program of the prepare kernel.
        prepare_max_registers, scan_max_registers: registers a thread of each may use, None for no limit; a limit trades
            spills for occupancy.
    """

    block_v: int
    scan_warps: int
    scan_stages: int
    prepare_warps: int = 4
    prepare_max_registers: int | None = None
    scan_max_registers: int | None = None


@dataclass(frozen=True)
class BackwardConfig:
    """How the kernels of the backward are launched.

    Attributes:
        attention_warps: warps a program of the prepare kernel that computes the attention matrices again.
        scan_block_v, scan_warps, scan_stages: of the reverse scan, as in `KernelConfig`.
        states_block_k, states_block_v, states_warps, states_stages: the same of the kernel that rebuilds the states,
            in tiles of states_block_k rows of K.
        matrices_block_v, matrices_warps, matrices_stages: of the kernel of a chunk's matrices: value columns at a time,
            warps a program, tiles in flight.
        gradients_block_k, gradients_block_v, gradients_warps, gradients_stages: the same of the kernel of a chunk's
            states, a program of which has gradients_block_k columns of K.
        scan_max_registers, states_max_registers, matrices_max_registers, gradients_max_registers: registers a thread,
            None for no limit.
    """

    attention_warps: int = 4
    scan_block_v: int = 32
    scan_warps: int = 4
    scan_stages: int = 2
    states_block_k: int = 64
    states_block_v: int = 32
    states_warps: int = 4
    states_stages: int = 3
    matrices_block_v: int = 64
    matrices_warps: int = 4
    matrices_stages: int = 1
    gradients_block_k: int = 64
    gradients_block_v: int = 64
    gradients_warps: int = 4
    gradients_stages: int = 2
    scan_max_registers: int | None = None
    states_max_registers: int | None = None
    matrices_max_registers: int | None = None
    gradients_max_registers: int | None = None


def block_size(n: int) -> int:
    """The tile size that covers n: the next power of two, at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def scan_shared_memory(config: KernelConfig, block_k: int, chunk_size: int, element_bytes: int, free_p: bool) -> int:
    """Upper estimate in bytes of the shared memory of the scan, against what Triton 3.6 allocates (tests/kernels)."""
    C, rows, slice_k = chunk_size, 2 * config.block_v, min(STATE_SLICE, block_k)
    if element_bytes == 4:  # both operands of one product at a time, each as two TF32 halves
        return max(2 * C * (C + rows) * 4, 4 * C * slice_k * 4) + SHARED_MEMORY_MARGIN
    state = rows * slice_k * element_bytes if config.scan_warps == 8 and config.block_v <= 32 else 0
    chunk = C * ((3 if free_p else 2) * block_k + 2 * C) * element_bytes
    if config.scan_stages > 1:
        tiles = config.scan_stages * (chunk + C * (config.block_v * element_bytes + 6 * 4))
    else:
        tiles = chunk + rows * C * 4  # and a product in float32 between layouts
    return tiles + state + SHARED_MEMORY_MARGIN


def prepare_shared_memory(block_k: int, chunk_size: int, element_bytes: int, free_p: bool) -> int:
    """The same of the prepare kernel: the operands of the largest product, or the tiles of q, k and p."""
    C = chunk_size
    tiles = (4 if element_bytes == 4 else 3) if free_p else 2
    return max(tiles * C * block_k * element_bytes, 2 * C * C * 4) + SHARED_MEMORY_MARGIN


def _check_head_dim_k(head_dim_k: int) -> None:
    if head_dim_k > MAX_HEAD_DIM_K:
        raise ValueError(
            f"q has head dimension {head_dim_k}: the GPU kernels take up to {MAX_HEAD_DIM_K}; "
            f"`mdnbench.kernels.reference.chunk_mdn` takes any"
        )


@functools.cache  # every call of the operator asks
def choose_config(
    head_dim_k: int,
    head_dim_v: int,
    chunk_size: int,
    element_bytes: int,
    heads: int,
    free_p: bool,
    shared_memory_bytes: int,
    multiprocessors: int,
) -> KernelConfig:
    """The configuration for a shape.

    Args:
        head_dim_k, head_dim_v, chunk_size: of the operator.
        element_bytes: 2 or 4, of q, k, v.
        heads: value heads of all sequences together.
        free_p: whether p is given.
        shared_memory_bytes: what a program may use on this GPU.
        multiprocessors: of this GPU.

    Raises:
        ValueError: when K is above 256, or no configuration fits the GPU's shared memory, naming what to change.
    """
    _check_head_dim_k(head_dim_k)
    block_k, block_v = block_size(head_dim_k), min(32, block_size(head_dim_v))
    prepare_warps = 4 if chunk_size <= 64 else 8
    max_registers = 168 if chunk_size == 64 and element_bytes == 2 else None
    if element_bytes == 4:
        config = KernelConfig(block_v, 4, 1)
    elif chunk_size == 128:
        config = KernelConfig(block_v, 8, 1)
    elif _are_tiles_wide(block_k, head_dim_v, chunk_size, heads, multiprocessors):
        config = KernelConfig(64, 8, 2)
    elif block_k > 128:
        config = KernelConfig(block_v, 4, 2)
    elif heads * -(-head_dim_v // 16) <= multiprocessors:  # the smallest tiles: each has a multiprocessor of its own
        config = KernelConfig(16, 4, 2)
    else:
        config = KernelConfig(block_v, 4, 2)
    config = replace(config, prepare_warps=prepare_warps, prepare_max_registers=max_registers)
    prepare_bytes = prepare_shared_memory(block_k, chunk_size, element_bytes, free_p)
    while (
        max(prepare_bytes, scan_shared_memory(config, block_k, chunk_size, element_bytes, free_p)) > shared_memory_bytes
    ):
        if config.scan_stages > 1:
            config = replace(config, scan_stages=config.scan_stages - 1)
        elif config.block_v > 16 and prepare_bytes <= shared_memory_bytes:
            warps = 4 if config.block_v == 64 else config.scan_warps
            config = replace(config, block_v=config.block_v // 2, scan_warps=warps)
        else:
            raise ValueError(
                f"chunk_size={chunk_size} with K={head_dim_k} and {element_bytes} bytes an element needs more shared "
                f"memory than the {shared_memory_bytes} bytes of this GPU: use a smaller chunk_size"
            )
    return config


def backward_shared_memory(
    config: BackwardConfig, block_k: int, chunk_size: int, element_bytes: int, free_p: bool
) -> dict[str, int]:
    """The same of the kernels of the backward, by the prefix of their fields in `BackwardConfig`."""
    C = chunk_size
    scan = KernelConfig(config.scan_block_v, config.scan_warps, config.scan_stages)
    matrices_v = 5 * C * config.matrices_block_v * element_bytes * config.matrices_stages
    if element_bytes == 4:  # operands of one product at a time, as two TF32 halves
        matrices = max(matrices_v, 3 * C * block_k * 4, 4 * C * C * 4) + 1024
        states = C * (2 * config.states_block_k + config.states_block_v) * 4
    else:
        operands = (3 if free_p else 2) * C * block_k * 2
        # and a product in float32 on its way out, or between layouts
        matrices = max(matrices_v + 4 * C * C, operands + 4 * C * max(block_k, C)) + SHARED_MEMORY_MARGIN
        states = C * (config.states_block_k + config.states_block_v) * 2
    gradients = (2 * C + 4 * config.gradients_block_k) * config.gradients_block_v * element_bytes
    return {
        "scan": scan_shared_memory(scan, block_k, C, element_bytes, free_p)
        + max(4 * C * config.scan_block_v, SHARED_MEMORY_MARGIN),
        "matrices": matrices,
        "states": config.states_stages * states + 2 * SHARED_MEMORY_MARGIN,
        "gradients": config.gradients_stages * gradients + 2 * SHARED_MEMORY_MARGIN,
    }


def _are_tiles_wide(block_k: int, head_dim_v: int, chunk_size: int, heads: int, multiprocessors: int) -> bool:
    """Whether the scans take 64 columns of V, with 8 warps. For K above 128 and chunks of 64 a multiprocessor holds one
    program of either width, and one of twice the width takes 1.3 times as long; below, two of half the width fit."""
    narrow_programs = heads * -(-head_dim_v // 32)
    return block_k > 128 and chunk_size == 64 and head_dim_v > 32 and narrow_programs > multiprocessors


@functools.cache
def choose_backward_config(
    head_dim_k: int,
    head_dim_v: int,
    chunk_size: int,
    element_bytes: int,
    heads: int,
    free_p: bool,
    shared_memory_bytes: int,
    multiprocessors: int,
) -> BackwardConfig:
    """The configuration of the backward for a shape; arguments and errors as of `choose_config`."""
    _check_head_dim_k(head_dim_k)
    block_k, block_v = block_size(head_dim_k), block_size(head_dim_v)
    few = heads * -(-head_dim_v // 16) <= multiprocessors
    wide = _are_tiles_wide(block_k, head_dim_v, chunk_size, heads, multiprocessors) and element_bytes == 2
    scan_v = 64 if wide else min(16 if few and block_k <= 128 else 32, block_v)
    # Tiles with more columns of V than of K are miscompiled for sm_90: the matrices kernel then reads out of bounds.
    chunk_v = min(32 if element_bytes == 4 else 64, block_v, block_k)
    small_tiles = heads * -(-block_k // 64) * -(-head_dim_v // 32)  # of the states
    config = BackwardConfig(
        scan_block_v=scan_v,
        scan_warps=8 if wide else 4,
        states_block_k=min(64 if small_tiles <= 4 * multiprocessors else 128, block_k),
        states_block_v=min(32, block_v),
        matrices_block_v=chunk_v,
        gradients_block_k=block_k if free_p else min(64, block_k),  # dp needs a whole row of p
        gradients_block_v=chunk_v,
        gradients_warps=8 if free_p else 4,
        gradients_max_registers=168 if chunk_size == 64 and element_bytes == 2 and not free_p else None,
    )
    if chunk_size == 128:
        config = replace(
            config, attention_warps=8, scan_warps=8, matrices_warps=8, gradients_warps=8,
            scan_stages=1, states_stages=1, gradients_stages=1,
        )  # fmt: skip
    if element_bytes == 4:
        config = replace(config, scan_warps=4, scan_stages=1, states_stages=1, gradients_stages=1)
    while True:
        needed = backward_shared_memory(config, block_k, chunk_size, element_bytes, free_p)
        kernel = max(needed, key=needed.get)
        if needed[kernel] <= shared_memory_bytes:
            return config
        stages = getattr(config, f"{kernel}_stages")
        if stages > 1:
            config = replace(config, **{f"{kernel}_stages": stages - 1})
        elif kernel == "scan" and config.scan_block_v > 16:
            warps = 4 if config.scan_block_v == 64 else config.scan_warps
            config = replace(config, scan_block_v=config.scan_block_v // 2, scan_warps=warps)
        else:
            raise ValueError(
                f"chunk_size={chunk_size} with K={head_dim_k} and {element_bytes} bytes an element needs more shared "
                f"memory in the backward pass than the {shared_memory_bytes} bytes of this GPU: use a smaller "
                f"chunk_size, or call under torch.no_grad()"
            )
