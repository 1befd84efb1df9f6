"""MDN token by token in one Triton kernel, and its registration with PyTorch: the decoding step.

    w_t = p_t^T S_{t-1} - v_t
    M_t = mu_t M_{t-1} + eta_t k_t w_t
    S_t = alpha_t S_{t-1} - beta_t M_t
    o_t = scale q_t^T S_t

A column of S and M needs no other column, so the state is cut along V: a program keeps [K, BV] of S and of M of one
head in registers, in float32, over all tokens of its sequence. At one token the time is that of reading and writing
the state: its tiles are loaded first, whatever else a token needs while they are on their way.

Arguments are documented and checked in `operator.py`; nothing is checked here.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import block_size
from .launch import Launch
from .library import LIBRARY, OPTIONS, TOKEN_ARGUMENTS, on_device_of, register
from .problem import contiguous
from .reference import L2NORM_EPS, recurrent_mdn

EPS = tl.constexpr(L2NORM_EPS)


class RecurrentConfig(NamedTuple):
    """How the state is spread: columns a program, and warps a program. Changes the speed alone."""

    BV: int
    num_warps: int


@triton.jit
def _load_token(
    q_ptr, k_ptr, v_ptr, log_alpha_ptr, log_mu_ptr, p_ptr, beta_ptr, eta_ptr,
    i_token, i_h, i_hv, o_k, o_v, m_k, m_v,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """What one token brings, as it lies in memory: q, k, p [BK], v [BV] and four numbers (log gates, beta, eta)."""
    o_qk = (i_token * H + i_h) * K + o_k
    o_gate = i_token * HV + i_hv
    b_q = tl.load(q_ptr + o_qk, mask=m_k, other=0.0)
    b_k = tl.load(k_ptr + o_qk, mask=m_k, other=0.0)
    b_v = tl.load(v_ptr + o_gate * V + o_v, mask=m_v, other=0.0)
    b_log_alpha = tl.load(log_alpha_ptr + o_gate)
    b_log_mu = tl.load(log_mu_ptr + o_gate)
    b_p = b_k
    if p_ptr is not None:
        b_p = tl.load(p_ptr + o_qk, mask=m_k, other=0.0)
    b_beta = 1.0
    if beta_ptr is not None:
        b_beta = tl.load(beta_ptr + o_gate).to(tl.float32)
    b_eta = 1.0
    if eta_ptr is not None:
        b_eta = tl.load(eta_ptr + o_gate).to(tl.float32)
    return b_q, b_k, b_p, b_v, b_log_alpha, b_log_mu, b_beta, b_eta


@triton.jit
def _unit(b_x):
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) + EPS)


@triton.jit(do_not_specialize=["T", "N"])
def recurrent_fwd_kernel(
    q_ptr, k_ptr, v_ptr, log_alpha_ptr, log_mu_ptr, p_ptr, beta_ptr, eta_ptr,  # None: p is k, beta or eta is 1
    initial_state_ptr, cu_seqlens_ptr,  # None: zeros; sequences of T tokens each
    o_ptr, final_state_ptr,  # None: the state is not kept
    scale, T, N,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, P_TIMES_ALPHA: tl.constexpr, ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """One program: all tokens of one sequence, for one value head and BV of its V columns.

    Programs of one head are neighbours, so that rows of its state are read in whole by programs that run together.
    ONE_TOKEN says that each sequence has exactly one token, which leaves no loop and nothing to load ahead.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_head = tl.program_id(0) // NV  # of all heads of all sequences
    i_n, i_hv = i_head // HV, i_head % HV
    i_h = i_hv // (HV // H)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V

    o_state = i_head.to(tl.int64) * (K * V) + (o_k[:, None] * V + o_v[None, :])
    o_momentum = N.to(tl.int64) * (HV * K * V)  # from a state's S to its M
    m_state = m_k[:, None] & m_v[None, :]
    if initial_state_ptr is None:
        b_S = tl.zeros([BK, BV], tl.float32)
        b_M = tl.zeros([BK, BV], tl.float32)
    else:
        b_S = tl.load(initial_state_ptr + o_state, mask=m_state, other=0.0).to(tl.float32)
        b_M = tl.load(initial_state_ptr + o_momentum + o_state, mask=m_state, other=0.0).to(tl.float32)
        # Without it the assembler puts the wait for q and k before the loads of the state, and memory idles meanwhile.
        tl.debug_barrier()

    if cu_seqlens_ptr is None:
        begin = i_n.to(tl.int64) * T
        length = T
    else:
        begin = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + i_n + 1) - begin).to(tl.int32)
        begin = tl.minimum(begin, T - 1)  # an empty sequence may begin after the last token, which is read below
    if ONE_TOKEN:
        length = 1

    token = _load_token(
        q_ptr, k_ptr, v_ptr, log_alpha_ptr, log_mu_ptr, p_ptr, beta_ptr, eta_ptr,
        begin, i_h, i_hv, o_k, o_v, m_k, m_v, H, HV, K, V,
    )  # fmt: skip
    for i in range(length):
        b_q, b_k, b_p, b_v, b_log_alpha, b_log_mu, b_beta, b_eta = token
        if not ONE_TOKEN:  # load ahead: the state of this token is a chain of operations that would wait for memory
            token = _load_token(
                q_ptr, k_ptr, v_ptr, log_alpha_ptr, log_mu_ptr, p_ptr, beta_ptr, eta_ptr,
                begin + tl.minimum(i + 1, length - 1), i_h, i_hv, o_k, o_v, m_k, m_v, H, HV, K, V,
            )  # fmt: skip
        b_q, b_k, b_p, b_v = b_q.to(tl.float32), b_k.to(tl.float32), b_p.to(tl.float32), b_v.to(tl.float32)
        if NORM:
            b_q, b_k, b_p = _unit(b_q), _unit(b_k), _unit(b_p)
        b_alpha, b_mu = tl.exp(b_log_alpha.to(tl.float32)), tl.exp(b_log_mu.to(tl.float32))
        if P_TIMES_ALPHA:
            b_p *= b_alpha

        b_w = tl.sum(b_p[:, None] * b_S, axis=0) - b_v  # [BV]
        b_M = b_mu * b_M + (b_eta * b_k)[:, None] * b_w[None, :]
        b_S = b_alpha * b_S - b_beta * b_M
        b_o = scale * tl.sum(b_q[:, None] * b_S, axis=0)
        o_out = ((begin + i) * HV + i_hv) * V + o_v
        tl.store(o_ptr + o_out, b_o.to(o_ptr.dtype.element_ty), mask=m_v)

    if final_state_ptr is not None:
        tl.store(final_state_ptr + o_state, b_S, mask=m_state)
        tl.store(final_state_ptr + o_momentum + o_state, b_M, mask=m_state)


@functools.cache
def default_config(K: int, V: int, heads: int) -> RecurrentConfig:
    """For `heads` heads of all sequences: 64 numbers of the state a thread, and 128 bytes of a row a program.

    With few heads, narrower tiles, down to the 32 bytes that memory is read in, until 128 programs share the work.
    """
    BV = min(32, block_size(V))
    while BV > 8 and heads * -(-V // BV) < 128:
        BV //= 2
    return RecurrentConfig(BV, min(8, max(1, block_size(K) * BV // 1024)))


@functools.lru_cache(maxsize=1024)
def _launch(
    T: int, N: int, H: int, HV: int, K: int, V: int, scale: float, l2norm: bool, use_p_times_alpha: bool,
    one_token: bool, config: RecurrentConfig,
) -> Launch:  # fmt: skip
    return Launch(
        recurrent_fwd_kernel, (-(-V // config.BV) * N * HV,), (scale, T, N),
        {
            "H": H, "HV": HV, "K": K, "V": V, "BK": block_size(K), "BV": config.BV, "NORM": l2norm,
            "P_TIMES_ALPHA": use_p_times_alpha, "ONE_TOKEN": one_token,
        },
        num_warps=config.num_warps,
    )  # fmt: skip


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    log_mu: Tensor,
    p: Tensor | None = None,
    beta: Tensor | None = None,
    eta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    use_p_times_alpha: bool = True,
    inplace: bool = False,
    config: RecurrentConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launches the kernel; arguments and results as `fused_recurrent_momentum_delta_rule`, `cu_seqlens` on q's device.

    Args:
        inplace: whether the final state is written to `initial_state`, float32 and contiguous, and that returned.
        config: None means `default_config`.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens = contiguous(
        q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens
    )
    o = torch.empty_like(v)
    final_state = None
    if inplace:
        final_state = initial_state
    elif output_final_state:
        final_state = torch.empty((2, N, HV, K, V), dtype=torch.float32, device=v.device)
    one_token = T == 1 and cu_seqlens is None
    scale = K**-0.5 if scale is None else float(scale)
    flags = (use_qk_l2norm_in_kernel, use_p_times_alpha, one_token)
    launch = _launch(T, N, H, HV, K, V, scale, *flags, config or default_config(K, V, N * HV))
    with on_device_of(q):
        launch(q, k, v, log_alpha, log_mu, p, beta, eta, initial_state, cu_seqlens, o, final_state)
    return o, final_state


def _reference(*arguments) -> tuple[Tensor, Tensor | None]:
    return recurrent_mdn(*arguments, compute_dtype=torch.float32)


def _inplace(q, k, v, log_alpha, log_mu, p, beta, eta, scale, initial_state, *options) -> Tensor:
    return recurrent_forward(
        q, k, v, log_alpha, log_mu, p, beta, eta, scale, initial_state, True, *options, inplace=True
    )[0]  # fmt: skip


def _inplace_fake(q, k, v, *others) -> Tensor:
    return v.new_empty(v.shape)


_functional = register("recurrent_mdn", recurrent_forward, _reference)
LIBRARY.define(f"recurrent_mdn_inplace({TOKEN_ARGUMENTS}, Tensor(a!) initial_state, {OPTIONS}) -> Tensor")
LIBRARY.impl("recurrent_mdn_inplace", _inplace, "CompositeExplicitAutograd")
torch.library.register_fake("mdnbench::recurrent_mdn_inplace", _inplace_fake, lib=LIBRARY)


def recurrent_triton(
    q, k, v, log_alpha, log_mu, p, beta, eta, scale, initial_state, output_final_state, cu_seqlens,
    use_qk_l2norm_in_kernel, use_p_times_alpha, inplace=False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`fused_recurrent_momentum_delta_rule` through the operators registered above; arguments checked."""
    before, options = (q, k, v, log_alpha, log_mu, p, beta, eta, scale), (use_qk_l2norm_in_kernel, use_p_times_alpha)
    if inplace:
        return torch.ops.mdnbench.recurrent_mdn_inplace(*before, initial_state, cu_seqlens, *options), initial_state
    return _functional(*before, initial_state, output_final_state, cu_seqlens, *options)
