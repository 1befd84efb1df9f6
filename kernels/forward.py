"""Launches the three stages of the chunk form: gates, prepare, scan. See README.md for the algorithm."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .config import KernelConfig, block_size, choose_config
from .gates import N_ROWS, gates_fwd_kernel
from .launch import Launch
from .library import on_device_of
from .prepare import prepare_fwd_kernel
from .problem import Problem, contiguous, is_layer_call, limited, limits_of, problem_of
from .scan import scan_fwd_kernel
from .store import tuned_config


class Forward(NamedTuple):
    """Results, and what the backward needs of the way to them; shapes as in the kernels that write them."""

    o: Tensor
    final_state: Tensor | None
    inverse: Tensor
    coefficients: Tensor
    low: Tensor | None
    errors: Tensor | None


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    log_mu: Tensor,
    p: Tensor | None,
    beta: Tensor | None,
    eta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    use_p_times_alpha: bool,
    chunk_size: int,
    config: KernelConfig | None = None,
    keep_errors: bool = False,
) -> Forward:
    """Output [B, T, HV, V] in q's dtype, the final state [2, N, HV, K, V] float32 or None, and what was computed on
    the way.

    Arguments are those of `chunk_momentum_delta_rule`, checked; q, k, v, p in float16, bfloat16 or float32, on a CUDA
    device, or on the CPU when Triton interprets.

    Args:
        config: in place of the stored one, or that of config.py.
        keep_errors: whether to write R.

    Raises:
        ValueError: when no configuration fits the GPU's shared memory.
    """
    packed_sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    x = problem_of(q.shape, v.shape, q.dtype, packed_sequences, scale, chunk_size, use_qk_l2norm_in_kernel)
    if config is None:
        has_states = initial_state is not None or output_final_state
        in_layer = is_layer_call(x, use_qk_l2norm_in_kernel, use_p_times_alpha, beta, eta, has_states)
        config = forward_config(x, q, p is not None, in_layer)
    q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens = contiguous(
        q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens
    )
    o = q.new_empty(v.shape)
    inverse = q.new_empty((x.slots, x.HV, x.C, x.C))
    attention = torch.empty_like(inverse)
    coefficients = q.new_empty((x.slots, x.HV, N_ROWS.value, x.C), dtype=torch.float32)
    final_state = low = None
    if output_final_state:
        final_state = q.new_empty((2, x.N, x.HV, x.K, x.V), dtype=torch.float32)
    if q.dtype == torch.float32:
        low = q.new_empty((x.slots, x.HV, 2, x.C))
    errors = torch.empty_like(o) if keep_errors else None

    gates, prepare = _before_scan(x, config, use_p_times_alpha, use_qk_l2norm_in_kernel)
    with on_device_of(q):
        gates(log_alpha, log_mu, beta, eta, coefficients, low, cu_seqlens)
        prepare(q, k, p, inverse, attention, coefficients, low, cu_seqlens)
        scan_launch(x, config)(
            q, k, p, v, inverse, attention, coefficients, initial_state, o, errors, final_state, cu_seqlens
        )
    return Forward(o, final_state, inverse, coefficients, low, errors)


def forward_config(x: Problem, q: Tensor, free_p: bool, in_layer: bool) -> KernelConfig:
    """The stored configuration for a call of a layer, or that of the table. Raises as `choose_config`."""
    tuned = tuned_config("forward", x, q, free_p) if in_layer else None
    return tuned or choose_config(x.K, x.V, x.C, q.element_size(), x.N * x.HV, free_p, *limits_of(q.device))


@functools.lru_cache(maxsize=1024)
def _before_scan(x: Problem, config: KernelConfig, use_p_times_alpha: bool, l2norm: bool) -> tuple[Launch, Launch]:
    """The kernels of the gates and of the matrices of the chunks."""
    gates = Launch(
        gates_fwd_kernel, (x.slots, -(-x.HV // x.block_h)), (x.scale, x.T, x.N, x.NT),
        {"HV": x.HV, "C": x.C, "BH": x.block_h, "P_TIMES_ALPHA": use_p_times_alpha, "VARLEN": x.packed},
        num_warps=1,
    )  # fmt: skip
    options = {"num_warps": config.prepare_warps, **limited(config.prepare_max_registers)}
    return gates, prepare_launch(x, use_p_times_alpha, l2norm, **options)


def prepare_launch(x: Problem, use_p_times_alpha: bool, l2norm: bool, **options: int) -> Launch:
    """The prepare kernel, which the backward launches too."""
    return Launch(
        prepare_fwd_kernel, (x.slots * x.HV,), (x.scale, x.T, x.N, x.NT),
        {
            "H": x.H, "HV": x.HV, "K": x.K, "C": x.C, "BK": block_size(x.K), "P_TIMES_ALPHA": use_p_times_alpha,
            "L2NORM": l2norm, "VARLEN": x.packed, "SOLVE_DTYPE": x.solve_dtype, "PRECISION": x.precision,
        },
        **options,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def scan_launch(x: Problem, config: KernelConfig) -> Launch:
    """The scan; of o, errors and the final state it writes what is not None."""
    return Launch(
        scan_fwd_kernel, (-(-x.V // config.block_v) * x.N * x.HV,), (x.T, x.N, x.NT),
        {
            "H": x.H, "HV": x.HV, "K": x.K, "V": x.V, "C": x.C, "BK": block_size(x.K), "BV": config.block_v,
            "VARLEN": x.packed, "PRECISION": x.precision, "STAGES": config.scan_stages,
        },
        num_warps=config.scan_warps, num_stages=config.scan_stages, **limited(config.scan_max_registers),
    )  # fmt: skip
