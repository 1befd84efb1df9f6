"""Launches the backward of the chunk form: attention again, reverse scan, states, gradients, gates. See README.md."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .config import BackwardConfig, block_size, choose_backward_config
from .forward import forward_config, launch_scan, of_prepare
from .gates import N_D_ROWS, N_LOCAL_ROWS, gates_bwd_kernel
from .gradients import gradients_bwd_kernel, matrices_bwd_kernel
from .launch import launch
from .library import on_device_of
from .prepare import prepare_fwd_kernel
from .problem import Problem, contiguous, limited, limits_of, problem_of
from .scan import scan_bwd_kernel
from .states import states_bwd_kernel
from .store import tuned_config


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
    o: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
    wanted: list[bool],
    config: BackwardConfig | None = None,
) -> Gradients:
    """Gradients of `chunk_momentum_delta_rule`, in the dtypes of the arguments.

    Args:
        q to chunk_size: as in the forward pass.
        inverse, coefficients, low, errors, o: of `chunk_forward`. Without errors (None) the scan runs again, and the
            states are held for half of the value heads at a time: slower, less memory. o may be None without L2 norm.
        do: [B, T, HV, V], gradient of the output.
        dfinal_state: [2, N, HV, K, V], gradient of the final state; None for zeros.
        wanted: for each field of `Gradients` whether to compute it.
        config: overrides the table of config.py.
    """
    packed_sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    x = problem_of(q.shape, v.shape, q.dtype, packed_sequences, scale, chunk_size, use_qk_l2norm_in_kernel)
    shape = (x.K, x.V, x.C, q.element_size(), x.N * x.HV, p is not None, *limits_of(q.device))
    config = config or tuned_config("backward", x, q, p is not None) or choose_backward_config(*shape)
    q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens, o, do, dfinal_state = contiguous(
        q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens, o, do, dfinal_state
    )
    want_q, want_k, want_v, want_alpha, want_mu, want_p, want_beta, want_eta, want_initial = wanted
    want_gates = want_alpha or want_mu or want_beta or want_eta
    want_chunks = want_gates or want_q or want_k or want_p  # and not what the scan gives alone
    groups = [(0, x.HV)]  # first value head and number of those that are done together
    if errors is None and want_chunks and x.HV > 1:
        half = x.HV // 2
        groups = [(0, x.HV - half), (x.HV - half, half)]
    heads = groups[0][1]
    key_tiles = -(-x.K // config.gradients_block_k)
    state_tiles = -(-x.K // config.states_block_k) * -(-x.V // config.states_block_v)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=q.device)

    dv = torch.empty_like(v)
    dinitial_state = empty(2, x.N, x.HV, x.K, x.V) if want_initial else None
    dq = dk = dp = states = dstates = local = dcoefficients = None
    if want_chunks:
        states, dstates = (empty(x.slots, heads, 2, x.V, x.K, dtype=q.dtype) for _ in range(2))
        local = empty(x.slots, x.HV, N_LOCAL_ROWS.value, x.C)
    if want_gates:
        dcoefficients = empty(x.slots, x.HV, key_tiles, N_D_ROWS.value, x.C)
    sizes = {
        "H": x.H, "HV": x.HV, "K": x.K, "V": x.V, "C": x.C, "BK": block_size(x.K), "VARLEN": x.packed,
        "PRECISION": x.precision,
    }  # fmt: skip
    of_norms = {"L2NORM": use_qk_l2norm_in_kernel}
    with on_device_of(q):
        if errors is None and want_chunks:
            errors = torch.empty_like(v)
            launch_scan(
                x, forward_config(x, q, p is not None), q, k, p, v, inverse, None, coefficients, initial_state,
                None, errors, None, cu_seqlens,
            )  # fmt: skip
        attention = torch.empty_like(inverse)
        launch(
            prepare_fwd_kernel, (x.slots * x.HV,),
            (q, k, p, None, attention, coefficients, low, cu_seqlens, x.scale, x.T, x.N, x.NT),
            of_prepare(x, use_p_times_alpha, use_qk_l2norm_in_kernel),
            num_warps=config.attention_warps,
        )  # fmt: skip
        for first_head, heads in groups:
            of_heads = {**sizes, "HEADS": heads}
            launch(
                scan_bwd_kernel, (-(-x.V // config.scan_block_v) * x.N * heads,),
                (
                    q, k, p, do, inverse, attention, coefficients, dfinal_state, dv, dstates, dinitial_state,
                    cu_seqlens, x.T, x.N, x.NT, first_head,
                ),
                {**of_heads, "BV": config.scan_block_v, "STAGES": config.scan_stages},
                **_options(config, "scan"),
            )  # fmt: skip
            if not want_chunks:
                continue
            if first_head + heads == x.HV:
                attention = None  # its memory may hold gradients
            if first_head == 0:
                dtype = q.dtype if x.HV == x.H else torch.float32
                dq, dk, dp = (
                    empty(x.B, x.T, x.HV, x.K, dtype=dtype) if want else None for want in (want_q, want_k, want_p)
                )
            launch(
                matrices_bwd_kernel, (x.slots * heads,),
                (
                    q, k, p, v, o, do, dv, errors, coefficients, low, dq, dk, dp, local, cu_seqlens,
                    x.scale, x.T, x.N, x.NT, first_head,
                ),
                {
                    **of_heads, "BV": config.matrices_block_v, "P_TIMES_ALPHA": use_p_times_alpha, **of_norms,
                    "GATES": want_gates, "DTYPE": x.matrix_dtype, "STAGES": config.matrices_stages,
                },
                **_options(config, "matrices"),
            )  # fmt: skip
            launch(
                states_bwd_kernel, (state_tiles * x.N * heads,),
                (k, errors, coefficients, initial_state, states, cu_seqlens, x.T, x.N, x.NT, first_head),
                {
                    **of_heads, "BK": config.states_block_k, "BV": config.states_block_v,
                    "STAGES": config.states_stages,
                },
                **_options(config, "states"),
            )  # fmt: skip
            launch(
                gradients_bwd_kernel, (x.slots * heads * key_tiles,),
                (
                    q, k, p, do, dv, errors, states, dstates, coefficients, local, dq, dk, dp, dcoefficients,
                    cu_seqlens, x.T, x.N, x.NT, first_head,
                ),
                {
                    **of_heads, "BK": config.gradients_block_k, "BV": config.gradients_block_v, **of_norms,
                    "STAGES": config.gradients_stages,
                },
                **_options(config, "gradients"),
            )  # fmt: skip
        del states, dstates, errors
        gates = ((log_alpha, want_alpha), (log_mu, want_mu), (beta, want_beta), (eta, want_eta))
        dgates = [torch.empty_like(gate) if want else None for gate, want in gates]
        if want_gates:
            launch(
                gates_bwd_kernel, (x.slots, -(-x.HV // x.block_h)),
                (log_alpha, log_mu, beta, eta, dcoefficients, local, *dgates, cu_seqlens, x.scale, x.T, x.N, x.NT),
                {
                    "HV": x.HV, "C": x.C, "BH": x.block_h, "KT": key_tiles, "P_TIMES_ALPHA": use_p_times_alpha,
                    "VARLEN": x.packed, "SUM_DTYPE": tl.float32 if low is None else tl.float64,
                },
                num_warps=2,
            )  # fmt: skip
    if x.HV != x.H:
        dq = _sum_of_groups(dq, x, q.dtype)
        dk = _sum_of_groups(dk, x, q.dtype)
        dp = _sum_of_groups(dp, x, q.dtype)
    if want_initial:
        dinitial_state = dinitial_state.to(initial_state.dtype)
    dlog_alpha, dlog_mu, dbeta, deta = dgates
    return Gradients(dq, dk, dv if want_v else None, dlog_alpha, dlog_mu, dp, dbeta, deta, dinitial_state)


def _options(config: BackwardConfig, kernel: str) -> dict[str, int]:
    """Options of the compiler from the fields of a kernel."""
    warps, stages = getattr(config, f"{kernel}_warps"), getattr(config, f"{kernel}_stages")
    return {"num_warps": warps, "num_stages": stages, **limited(getattr(config, f"{kernel}_max_registers"))}


def _sum_of_groups(dx: Tensor | None, x: Problem, dtype: torch.dtype) -> Tensor | None:
    """Gradient of a head [B, T, H, K] from those of its value heads [B, T, HV, K]."""
    return None if dx is None else dx.view(x.B, x.T, x.H, x.HV // x.H, x.K).sum(3).to(dtype)
