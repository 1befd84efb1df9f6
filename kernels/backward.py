"""Launches the backward of the chunk form: attention again, reverse scan, states, gradients, gates. See README.md."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .config import BackwardConfig, block_size, choose_backward_config, choose_config
from .forward import launch_scan, of_prepare
from .gates import N_D_ROWS, N_LOCAL_ROWS, gates_bwd_kernel
from .gradients import gradients_bwd_kernel, matrices_bwd_kernel
from .launch import launch
from .library import on_device_of
from .prepare import prepare_fwd_kernel
from .problem import contiguous, limited, limits_of, problem_of
from .scan import scan_bwd_kernel
from .states import states_bwd_kernel


class Gradients(NamedTuple):
    """Of the arguments of the same names; None where not wanted."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dlog_alpha: Tensor | None
    dlog_mu: Tensor | None
    dp: Tensor | None
    dbeta: Tensor | None
    deta: Tensor | None
    dinitial_state: Tensor | None


def chunk_backward(
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
    cu_seqlens: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    use_p_times_alpha: bool,
    chunk_size: int,
    inverse: Tensor,
    coefficients: Tensor,
    low: Tensor | None,
    errors: Tensor | None,
    o: Tensor,
    do: Tensor,
    dfinal_state: Tensor | None,
    wanted: list[bool],
    config: BackwardConfig | None = None,
) -> Gradients:
    """Gradients of `chunk_momentum_delta_rule`, in the dtypes of the arguments.

    Args:
        q to chunk_size: as in the forward pass.
        inverse, coefficients, low, errors, o: of `chunk_forward`. Without errors (None) the scan runs again, and the
            states are held for a part of the value heads at a time, half of them if it can be: slower, less memory.
        do: [B, T, HV, V], gradient of the output.
        dfinal_state: [2, N, HV, K, V], gradient of the final state; None for zeros.
        wanted: for each field of `Gradients` whether to compute it.
        config: overrides the table of config.py.
    """
    packed_sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    x = problem_of(q.shape, v.shape, q.dtype, packed_sequences, scale, chunk_size, use_qk_l2norm_in_kernel)
    free_p = p is not None
    shape = (x.K, x.V, x.C, q.element_size(), x.N * x.HV, free_p, *limits_of(q.device))
    config = config or choose_backward_config(*shape)
    q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens, o, do, dfinal_state = contiguous(
        q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens, o, do, dfinal_state
    )
    wants = Gradients(*wanted)
    wants_gates = wants.dlog_alpha or wants.dlog_mu or wants.dbeta or wants.deta
    wants_chunks = wants_gates or wants.dq or wants.dk or wants.dp  # and not what the scan gives alone
    heads = x.HV if errors is not None else next((x.HV // n for n in range(2, x.HV) if x.HV % n == 0), 1)
    key_tiles = -(-x.K // config.gradients_block_k)
    state_tiles = -(-x.K // config.states_block_k) * -(-x.V // config.states_block_v)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    dv = torch.empty_like(v)
    dinitial_state = empty(2, x.N, x.HV, x.K, x.V) if wants.dinitial_state else None
    dq = dk = dp = states = dstates = local = dcoefficients = None
    if wants_chunks:
        states, dstates = (empty(x.slots, heads, 2, x.V, x.K, dtype=q.dtype) for _ in range(2))
        local = empty(x.slots, x.HV, N_LOCAL_ROWS.value, x.C)
    if wants_gates:
        dcoefficients = empty(x.slots, x.HV, key_tiles, N_D_ROWS.value, x.C)
    of_heads = {
        "H": x.H, "HV": x.HV, "HEADS": heads, "K": x.K, "V": x.V, "C": x.C, "BK": block_size(x.K),
        "VARLEN": x.packed, "PRECISION": x.precision,
    }  # fmt: skip
    with on_device_of(q):
        if errors is None and wants_chunks:
            errors = torch.empty_like(v)
            launch_scan(
                x, choose_config(*shape), q, k, p, v, inverse, None, coefficients, initial_state,
                None, errors, None, cu_seqlens,
            )  # fmt: skip
        attention = torch.empty_like(inverse)
        launch(
            prepare_fwd_kernel, (x.slots * x.HV,),
            (q, k, p, None, attention, coefficients, low, cu_seqlens, x.scale, x.T, x.N, x.NT),
            of_prepare(x, use_p_times_alpha, use_qk_l2norm_in_kernel),
            num_warps=config.attention_warps,
        )  # fmt: skip
        for first_head in range(0, x.HV, heads):
            launch(
                scan_bwd_kernel, (-(-x.V // config.scan_block_v) * x.N * heads,),
                (
                    q, k, p, do, inverse, attention, coefficients, dfinal_state, dv, dstates, dinitial_state,
                    cu_seqlens, x.T, x.N, x.NT, first_head,
                ),
                {**of_heads, "BV": config.scan_block_v, "STAGES": config.scan_stages},
                num_warps=config.scan_warps, num_stages=config.scan_stages, **limited(config.scan_max_registers),
            )  # fmt: skip
            if not wants_chunks:
                continue
            if first_head == 0:
                if heads == x.HV:
                    attention = None  # its memory may hold gradients
                dq, dk, dp = (
                    empty(x.B, x.T, x.HV, x.K, dtype=q.dtype if x.HV == x.H else torch.float32) if wanted else None
                    for wanted in (wants.dq, wants.dk, wants.dp)
                )
            launch(
                matrices_bwd_kernel, (x.slots * heads,),
                (
                    q, k, p, v, o, do, dv, errors, coefficients, low, dq, dk, dp, local, cu_seqlens,
                    x.scale, x.T, x.N, x.NT, first_head,
                ),
                {
                    **of_heads, "BV": config.matrices_block_v, "P_TIMES_ALPHA": use_p_times_alpha,
                    "L2NORM": use_qk_l2norm_in_kernel, "GATES": bool(wants_gates), "DTYPE": x.matrix_dtype,
                    "STAGES": config.matrices_stages,
                },
                num_warps=config.matrices_warps, num_stages=config.matrices_stages,
                **limited(config.matrices_max_registers),
            )  # fmt: skip
            launch(
                states_bwd_kernel, (state_tiles * x.N * heads,),
                (k, errors, coefficients, initial_state, states, cu_seqlens, x.T, x.N, x.NT, first_head),
                {**of_heads, "BK": config.states_block_k, "BV": config.states_block_v, "STAGES": config.states_stages},
                num_warps=config.states_warps, num_stages=config.states_stages,
            )  # fmt: skip
            launch(
                gradients_bwd_kernel, (x.slots * heads * key_tiles,),
                (
                    q, k, p, do, dv, errors, states, dstates, coefficients, local, dq, dk, dp, dcoefficients,
                    cu_seqlens, x.T, x.N, x.NT, first_head,
                ),
                {
                    **of_heads, "BK": config.gradients_block_k, "BV": config.gradients_block_v,
                    "L2NORM": use_qk_l2norm_in_kernel, "STAGES": config.gradients_stages,
                },
                num_warps=config.gradients_warps, num_stages=config.gradients_stages,
                **limited(config.gradients_max_registers),
            )  # fmt: skip
        del states, dstates
        gates = zip((log_alpha, log_mu, beta, eta), (wants.dlog_alpha, wants.dlog_mu, wants.dbeta, wants.deta))
        dgates = [torch.empty_like(gate) if wanted else None for gate, wanted in gates]
        if wants_gates:
            launch(
                gates_bwd_kernel, (x.slots, -(-x.HV // x.block_h)),
                (
                    log_alpha, log_mu, beta, eta, dcoefficients, local, *dgates, cu_seqlens,
                    x.scale, x.T, x.N, x.NT,
                ),
                {
                    "HV": x.HV, "C": x.C, "BH": x.block_h, "KT": key_tiles, "P_TIMES_ALPHA": use_p_times_alpha,
                    "VARLEN": x.packed, "SUM_DTYPE": tl.float32 if low is None else tl.float64,
                },
                num_warps=2,
            )  # fmt: skip
    if x.HV != x.H:
        groups = (x.B, x.T, x.H, x.HV // x.H, x.K)
        dq, dk, dp = (None if d is None else d.view(groups).sum(3).to(q.dtype) for d in (dq, dk, dp))
    if dinitial_state is not None:
        dinitial_state = dinitial_state.to(initial_state.dtype)
    dlog_alpha, dlog_mu, dbeta, deta = dgates
    return Gradients(dq, dk, dv if wants.dv else None, dlog_alpha, dlog_mu, dp, dbeta, deta, dinitial_state)
