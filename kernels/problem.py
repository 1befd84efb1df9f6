"""What the launchers of the forward and of the backward share: sizes, precision, limits of the GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .slots import count_slots

GATE_HEADS = 8  # value heads a program of the gates kernels: a 32-byte sector of each token's gates
INTERPRETER_LIMITS = (232448, 132)  # of an H200: what the interpreter stands in for


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """Sizes of a call, as in `chunk_momentum_delta_rule`, and how the kernels compute.

    `problem_of` gives the same object for the same call, so that it is a quick key for what follows from it.
    """

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    C: int  # chunk size
    N: int  # sequences
    NT: int  # chunks a sequence, when not packed
    slots: int  # of slots.py
    packed: bool
    scale: float
    precision: str  # of products, as `input_precision` of tl.dot
    solve_dtype: tl.dtype  # operands of the products that invert I + L
    matrix_dtype: tl.dtype  # operands of the products of a chunk's matrices in the backward
    block_h: int  # value heads a program of the gates kernels


@functools.lru_cache(maxsize=1024)  # every call of the operator asks
def problem_of(
    q_shape: torch.Size,
    v_shape: torch.Size,
    dtype: torch.dtype,
    packed_sequences: int | None,
    scale: float | None,
    chunk_size: int,
    l2norm: bool,
) -> Problem:
    """From the arguments of `chunk_momentum_delta_rule`; `packed_sequences` is None for a batch."""
    B, T, H, K = q_shape
    HV, V = v_shape[2:]
    packed = packed_sequences is not None
    N = packed_sequences if packed else B
    if dtype == torch.float32:
        precision, solve_dtype = "tf32x3", tl.float32
    else:  # float16 has TF32's digits; with normalised keys its range holds unless errors grow by 1e4 in half a chunk
        precision, solve_dtype = "tf32", tl.float16 if l2norm else tl.float32
    return Problem(
        B, T, H, HV, K, V, chunk_size, N, -(-T // chunk_size), count_slots(T, N, chunk_size, packed), packed,
        K**-0.5 if scale is None else float(scale), precision, solve_dtype,
        tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, min(GATE_HEADS, 1 << (HV - 1).bit_length()),
    )  # fmt: skip


def is_layer_call(
    x: Problem, use_qk_l2norm_in_kernel: bool, use_p_times_alpha: bool, beta: Tensor | None, eta: Tensor | None,
    has_states: bool,
) -> bool:  # fmt: skip
    """Whether a call is as a layer makes it, in training or without gradients, with no state. Stored configurations
    were checked in such calls and serve no others, for which other code is compiled.

    Args:
        has_states: whether there is an initial state, or a final one, or its gradient.
    """
    return (
        use_qk_l2norm_in_kernel and use_p_times_alpha and not x.packed and x.H == x.HV
        and beta is not None and eta is not None and not has_states
    )  # fmt: skip


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


@functools.cache
def limits_of(device: torch.device) -> tuple[int, int]:
    """Shared memory a program may use in bytes, and multiprocessors."""
    if device.type != "cuda":
        return INTERPRETER_LIMITS
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["max_shared_mem"], properties["multiprocessor_count"]


def limited(max_registers: int | None) -> dict[str, int]:
    """The compiler's option for registers a thread."""
    return {} if max_registers is None else {"maxnreg": max_registers}
