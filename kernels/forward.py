"""Launches the three stages of the chunk form: gates, prepare, scan. See README.md for the algorithm."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import KernelConfig, block_size, choose_config
from .gates import N_ROWS, gates_fwd_kernel
from .library import on_device_of, register
from .prepare import prepare_fwd_kernel
from .reference import chunk_mdn
from .scan import scan_fwd_kernel
from .slots import count_slots

GATE_HEADS = 8  # value heads a program of the gates kernel: a 32-byte sector of each token's gates
INTERPRETER_LIMITS = (232448, 132)  # of an H200: what the interpreter stands in for


@functools.cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Shared memory a program may use in bytes, and multiprocessors."""
    if device.type != "cuda":
        return INTERPRETER_LIMITS
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["max_shared_mem"], properties["multiprocessor_count"]


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
) -> tuple[Tensor, Tensor | None]:
    """Output [B, T, HV, V] in q's dtype and the final state [2, N, HV, K, V] float32, or None.

    Arguments are those of `chunk_momentum_delta_rule`, checked; q, k, v, p in float16, bfloat16 or float32, on a CUDA
    device, or on the CPU when Triton interprets. `config` overrides the table of config.py.

    Raises:
        ValueError: when no configuration fits the GPU's shared memory.
    """
    B, T, H, K = q.shape
    scale = K**-0.5 if scale is None else float(scale)
    HV, V = v.shape[2:]
    C = chunk_size
    varlen = cu_seqlens is not None
    N = len(cu_seqlens) - 1 if varlen else B
    NT = triton.cdiv(T, C)
    slots = count_slots(T, N, C, varlen)
    if config is None:
        config = choose_config(K, V, C, q.element_size(), N * HV, p is not None, *_limits(q.device))
    q, k, v, log_alpha, log_mu = (x.contiguous() for x in (q, k, v, log_alpha, log_mu))
    p, beta, eta, initial_state, cu_seqlens = (
        None if x is None else x.contiguous() for x in (p, beta, eta, initial_state, cu_seqlens)
    )

    o = torch.empty(B, T, HV, V, dtype=q.dtype, device=q.device)
    final_state = torch.empty(2, N, HV, K, V, dtype=torch.float32, device=q.device) if output_final_state else None
    inverse = torch.empty(slots, HV, C, C, dtype=q.dtype, device=q.device)
    attention = torch.empty_like(inverse)
    coefficients = torch.empty(slots, HV, N_ROWS.value, C, dtype=torch.float32, device=q.device)
    low = torch.empty(slots, HV, 2, C, dtype=torch.float32, device=q.device) if q.dtype == torch.float32 else None

    if q.dtype == torch.float32:
        precision, solve_dtype = "tf32x3", tl.float32
    else:  # float16 has TF32's digits; with normalised keys its range holds unless errors grow by 1e4 in half a chunk
        precision, solve_dtype = "tf32", tl.float16 if use_qk_l2norm_in_kernel else tl.float32
    heads = {"H": H, "HV": HV, "K": K, "C": C, "BK": block_size(K)}
    shape = {**heads, "FREE_P": p is not None, "VARLEN": varlen, "PRECISION": precision}
    options = {} if config.prepare_max_registers is None else {"maxnreg": config.prepare_max_registers}
    block_h = min(GATE_HEADS, triton.next_power_of_2(HV))
    with on_device_of(q):
        gates_fwd_kernel[(slots, triton.cdiv(HV, block_h))](
            log_alpha, log_mu, beta, eta, coefficients, low, cu_seqlens, scale, T, N, NT,
            HV=HV, C=C, BH=block_h, HAS_BETA=beta is not None, HAS_ETA=eta is not None,
            P_TIMES_ALPHA=use_p_times_alpha, VARLEN=varlen, num_warps=1,
        )  # fmt: skip
        prepare_fwd_kernel[(slots * HV,)](
            q, k, p, inverse, attention, coefficients, low, cu_seqlens, scale, T, N, NT, **shape,
            P_TIMES_ALPHA=use_p_times_alpha, L2NORM=use_qk_l2norm_in_kernel, SOLVE_DTYPE=solve_dtype,
            num_warps=config.prepare_warps, **options,
        )  # fmt: skip
        scan_fwd_kernel[(triton.cdiv(V, config.block_v) * N * HV,)](
            q, k, p, v, inverse, attention, coefficients, initial_state, o, final_state, cu_seqlens, T, N, NT, **shape,
            V=V, BV=config.block_v, HAS_INITIAL=initial_state is not None, STORE_FINAL=output_final_state,
            STAGES=config.scan_stages, num_warps=config.scan_warps, num_stages=config.scan_stages,
        )  # fmt: skip
    return o, final_state


chunk_triton = register("chunk_mdn", chunk_forward, chunk_mdn, "int chunk_size")
