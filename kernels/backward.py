"""Launches the backward of the chunk form: attention again, reverse scan, states, gradients, gates. See README.md."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .config import BackwardConfig, block_size, choose_backward_config
from .forward import forward_config, prepare_launch, scan_launch
from .gates import N_D_ROWS, N_LOCAL_ROWS, gates_bwd_kernel
from .gradients import gradients_bwd_kernel, matrices_bwd_kernel
from .launch import Launch
from .library import on_device_of
from .problem import Problem, contiguous, is_layer_call, limited, limits_of, problem_of
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
        config: in place of the stored one, or that of config.py.
    """
    packed_sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    x = problem_of(q.shape, v.shape, q.dtype, packed_sequences, scale, chunk_size, use_qk_l2norm_in_kernel)
    if config is None:
        has_states = initial_state is not None or dfinal_state is not None
        in_layer = is_layer_call(x, use_qk_l2norm_in_kernel, use_p_times_alpha, beta, eta, has_states)
        of_all = wanted[:8] == [True] * 5 + [p is not None, True, True] and errors is not None
        config = tuned_config("backward", x, q, p is not None) if in_layer and of_all else None
    if config is None:
        limits = limits_of(q.device)
        config = choose_backward_config(x.K, x.V, x.C, q.element_size(), x.N * x.HV, p is not None, *limits)
    q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens, o, do, dfinal_state = contiguous(
        q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens, o, do, dfinal_state
    )
    want_q, want_k, want_v, want_alpha, want_mu, want_p, want_beta, want_eta, want_initial = wanted
    want_gates = want_alpha or want_mu or want_beta or want_eta
    want_chunks = want_gates or want_q or want_k or want_p  # and not what the scan gives alone
    halves = errors is None and want_chunks and x.HV > 1
    launches = _launches(x, config, halves, want_gates, use_p_times_alpha, use_qk_l2norm_in_kernel)
    heads = launches.groups[0].heads

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_empty(sizes, dtype=dtype)

    dv = torch.empty_like(v)
    dinitial_state = empty(2, x.N, x.HV, x.K, x.V) if want_initial else None
    dq = dk = dp = states = dstates = local = dcoefficients = None
    if want_chunks:
        states, dstates = (empty(x.slots, heads, 2, x.V, x.K, dtype=q.dtype) for _ in range(2))
        local = empty(x.slots, x.HV, N_LOCAL_ROWS.value, x.C)
    if want_gates:
        dcoefficients = empty(x.slots, x.HV, launches.key_tiles, N_D_ROWS.value, x.C)
    with on_device_of(q):
        if errors is None and want_chunks:
            errors = torch.empty_like(v)
            scan_launch(x, forward_config(x, q, p is not None, False))(
                q, k, p, v, inverse, None, coefficients, initial_state, None, errors, None, cu_seqlens
            )
        attention = torch.empty_like(inverse)
        launches.attention(q, k, p, None, attention, coefficients, low, cu_seqlens)
        for group in launches.groups:
            group.scan(
                q, k, p, do, inverse, attention, coefficients, dfinal_state, dv, dstates, dinitial_state, cu_seqlens
            )
            if not want_chunks:
                continue
            if group is launches.groups[-1]:
                attention = None  # its memory may hold gradients
            if group is launches.groups[0]:
                dtype = q.dtype if x.HV == x.H else torch.float32
                dq, dk, dp = (
                    empty(x.B, x.T, x.HV, x.K, dtype=dtype) if want else None for want in (want_q, want_k, want_p)
                )
            group.matrices(q, k, p, v, o, do, dv, errors, coefficients, low, dq, dk, dp, local, cu_seqlens)
            group.states(k, errors, coefficients, initial_state, states, cu_seqlens)
            group.gradients(
                q, k, p, do, dv, errors, states, dstates, coefficients, local, dq, dk, dp, dcoefficients, cu_seqlens
            )
        del states, dstates, errors
        gates = ((log_alpha, want_alpha), (log_mu, want_mu), (beta, want_beta), (eta, want_eta))
        dgates = [torch.empty_like(gate) if want else None for gate, want in gates]
        if want_gates:
            launches.gates(log_alpha, log_mu, beta, eta, dcoefficients, local, *dgates, cu_seqlens)
    if x.HV != x.H:
        dq = _sum_of_groups(dq, x, q.dtype)
        dk = _sum_of_groups(dk, x, q.dtype)
        dp = _sum_of_groups(dp, x, q.dtype)
    if want_initial:
        dinitial_state = dinitial_state.to(initial_state.dtype)
    dlog_alpha, dlog_mu, dbeta, deta = dgates
    return Gradients(dq, dk, dv if want_v else None, dlog_alpha, dlog_mu, dp, dbeta, deta, dinitial_state)


class _Group(NamedTuple):
    """What runs for value heads that are done together."""

    heads: int
    scan: Launch
    matrices: Launch
    states: Launch
    gradients: Launch


class _Launches(NamedTuple):
    attention: Launch
    groups: tuple[_Group, ...]
    gates: Launch
    key_tiles: int  # programs of `gradients` a chunk and head


@functools.lru_cache(maxsize=1024)
def _launches(
    x: Problem, config: BackwardConfig, halves: bool, want_gates: bool, use_p_times_alpha: bool, l2norm: bool
) -> _Launches:
    """With `halves`, half of the value heads at a time."""
    key_tiles = -(-x.K // config.gradients_block_k)
    state_tiles = -(-x.K // config.states_block_k) * -(-x.V // config.states_block_v)
    sizes = {
        "H": x.H, "HV": x.HV, "K": x.K, "V": x.V, "C": x.C, "BK": block_size(x.K), "VARLEN": x.packed,
        "PRECISION": x.precision,
    }  # fmt: skip
    tokens = (x.T, x.N, x.NT)
    groups = []
    half = x.HV // 2
    for first_head, heads in ((0, x.HV - half), (x.HV - half, half)) if halves else ((0, x.HV),):
        of_heads = {**sizes, "HEADS": heads}
        reverse_scan = Launch(
            scan_bwd_kernel, (-(-x.V // config.scan_block_v) * x.N * heads,), (*tokens, first_head),
            {**of_heads, "BV": config.scan_block_v, "STAGES": config.scan_stages},
            **_options(config, "scan"),
        )  # fmt: skip
        matrices = Launch(
            matrices_bwd_kernel, (x.slots * heads,), (x.scale, *tokens, first_head),
            {
                **of_heads, "BV": config.matrices_block_v, "P_TIMES_ALPHA": use_p_times_alpha, "L2NORM": l2norm,
                "GATES": want_gates, "DTYPE": x.matrix_dtype, "STAGES": config.matrices_stages,
            },
            **_options(config, "matrices"),
        )  # fmt: skip
        states = Launch(
            states_bwd_kernel, (state_tiles * x.N * heads,), (*tokens, first_head),
            {
                **of_heads, "BK": config.states_block_k, "BV": config.states_block_v, "STAGES": config.states_stages,
            },
            **_options(config, "states"),
        )  # fmt: skip
        gradients = Launch(
            gradients_bwd_kernel, (x.slots * heads * key_tiles,), (*tokens, first_head),
            {
                **of_heads, "BK": config.gradients_block_k, "BV": config.gradients_block_v, "L2NORM": l2norm,
                "STAGES": config.gradients_stages,
            },
            **_options(config, "gradients"),
        )  # fmt: skip
        groups.append(_Group(heads, reverse_scan, matrices, states, gradients))
    gates = Launch(
        gates_bwd_kernel, (x.slots, -(-x.HV // x.block_h)), (x.scale, *tokens),
        {
            "HV": x.HV, "C": x.C, "BH": x.block_h, "KT": key_tiles, "P_TIMES_ALPHA": use_p_times_alpha,
            "VARLEN": x.packed, "SUM_DTYPE": tl.float64 if x.precision == "tf32x3" else tl.float32,
        },
        num_warps=2,
    )  # fmt: skip
    attention = prepare_launch(x, use_p_times_alpha, l2norm, num_warps=config.attention_warps)
    return _Launches(attention, tuple(groups), gates, key_tiles)


def _options(config: BackwardConfig, kernel: str) -> dict[str, int]:
    """Options of the compiler from the fields of a kernel."""
    warps, stages = getattr(config, f"{kernel}_warps"), getattr(config, f"{kernel}_stages")
    return {"num_warps": warps, "num_stages": stages, **limited(getattr(config, f"{kernel}_max_registers"))}


def _sum_of_groups(dx: Tensor | None, x: Problem, dtype: torch.dtype) -> Tensor | None:
    """Gradient of a head [B, T, H, K] from those of its value heads [B, T, HV, K]."""
    return None if dx is None else dx.view(x.B, x.T, x.H, x.HV // x.H, x.K).sum(3).to(dtype)
