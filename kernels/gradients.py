"""Backward: the gradients of a chunk through its matrices, and through the states at its ends; all chunks at once.

With D = tril(dO R^T), E = -strict_tril(dW R^T) the gradients of A_qk and L, and with the elements of both but for their
products of tokens,

    F = D * scale G eta_j,  H = E * (alpha G') eta_j    (A_qk = F_ij / D_ij * q_i k_j, L = H_ij / E_ij * p_i k_j)
    dQ = F K + out_s (dO S^T) + out_n (dO N^T)
    dP = H K - read_s (dW S^T) - read_n (dW N^T)
    dK = F^T Q + H^T P + write_s (R dS^T) + write_n (R dN^T)

and dP is added to dK where p is k. (dL = -T^T dR R^T is -dW R^T: neither T nor its gradient is needed here.) The same
products, times the tokens and summed over K, are the gradients of the coefficients. The matrices' own share in the
gradients of the gates comes from G' = A' diag(beta) U by

    X = A'^T dG',  dbeta_l = sum_j X_lj U_lj,  dU = beta X,  dA' = dG' (beta U)^T

and a log gate collects dA' * A' (dU * U) over all pairs of tokens that it lies between: a sum, not a difference of
running sums, which would cancel.
"""

import triton
import triton.language as tl

from .gates import (
    ALPHA,
    BETA,
    D_CARRY,
    D_OUT_N,
    D_OUT_S,
    D_READ_N,
    D_READ_S,
    D_WRITE_N,
    D_WRITE_S,
    DOT_K,
    DOT_Q,
    ETA,
    LOCAL_ALPHA,
    LOCAL_BETA,
    LOCAL_ETA,
    LOCAL_MU,
    N_D_ROWS,
    N_LOCAL_ROWS,
    N_ROWS,
    NORM_K,
    NORM_P,
    NORM_Q,
    OUT_N,
    OUT_S,
    READ_N,
    READ_S,
    WRITE_N,
    WRITE_S,
)
from .prepare import EPS, decay_matrices
from .slots import locate_chunk


@triton.jit
def _inverse_row_norms(b_x):
    """1 / ||x_i|| for every row of b_x [C, BK]."""
    return tl.rsqrt(tl.sum(b_x.to(tl.float32) * b_x.to(tl.float32), axis=1) + EPS)


@triton.jit
def _row_sums(b_x, b_y):
    """Scalar product of every row of b_x and b_y."""
    return tl.sum(b_x.to(tl.float32) * b_y.to(tl.float32), axis=1)


@triton.jit
def _to_operand(b_x, DTYPE: tl.constexpr):
    """In DTYPE, within float16's range: an entry is beyond it where tokens are zero, and is multiplied by them."""
    if tl.float16 == DTYPE:
        b_x = tl.clamp(b_x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return b_x.to(DTYPE)


@triton.jit
def _add_and_store(p_dx, p_dot, mask, b_dx, b_x, L2NORM: tl.constexpr):
    """Add b_dx to what is at p_dx, and take the sum, the gradient of x / ||x|| times 1 / ||x||, to that of x."""
    b_dx += tl.load(p_dx, mask=mask, other=0.0)
    if L2NORM:
        b_dx -= b_x.to(tl.float32) * tl.load(p_dot)
    tl.store(p_dx, b_dx.to(p_dx.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(p_row, b_sum, p_norm, L2NORM: tl.constexpr):
    """Scalar products with tokens as with tokens of norm 1."""
    if L2NORM:
        b_sum *= tl.load(p_norm)
    tl.store(p_row, b_sum)


@triton.jit(do_not_specialize=["T", "N", "NT", "first_head"])
def matrices_bwd_kernel(
    q_ptr, k_ptr, p_ptr, v_ptr, o_ptr, do_ptr, dv_ptr, r_ptr, coefficients_ptr, low_ptr,
    dq_ptr, dk_ptr, dp_ptr, local_ptr, cu_seqlens_ptr,
    scale, T, N, NT, first_head,
    H: tl.constexpr, HV: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    P_TIMES_ALPHA: tl.constexpr, L2NORM: tl.constexpr, GATES: tl.constexpr, DTYPE: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: what goes through the matrices of one chunk, for one of HEADS value heads from first_head.

    q, k, p: [tokens, H, K] (p None where it is k); v, o, do, dv, r: [tokens, HV, V]. Written, each unless None: dq,
    dk, dp [tokens, HV, K], times the inverse norms of the tokens; local [slots, HV, N_LOCAL_ROWS, C] float32, the rows
    of gates if GATES, those of tokens if L2NORM.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    slot = tl.program_id(0) // HEADS
    i_hv = first_head + tl.program_id(0) % HEADS
    i_h = i_hv // (HV // H)
    _, first, end, i_c = locate_chunk(cu_seqlens_ptr, slot, T, N, NT, C, VARLEN)
    if first + i_c * C >= end:
        return
    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_t = first + i_c * C + o_i
    m_t = o_t < end
    m_qk = m_t[:, None] & (o_k < K)[None, :]
    o_qk = (o_t * H + i_h)[:, None] * K + o_k[None, :]  # [C, BK] int64
    o_vo = (o_t * HV + i_hv)[:, None] * V + o_v[None, :]  # [C, BV] int64
    index = slot.to(tl.int64) * HV + i_hv
    p_c = coefficients_ptr + index * (N_ROWS * C)
    p_row = p_c + o_i[:, None]
    p_col = p_c + o_i[None, :]

    b_d = tl.zeros([C, C], dtype=tl.float32)
    b_e = tl.zeros([C, C], dtype=tl.float32)
    b_dot_q = tl.zeros([C], dtype=tl.float32)
    b_dot_k = tl.zeros([C], dtype=tl.float32)
    p_local = local_ptr + index * (N_LOCAL_ROWS * C)
    for i_v in tl.range(0, NV, num_stages=STAGES):
        m_vo = m_t[:, None] & (i_v * BV + o_v < V)[None, :]
        b_do = tl.load(do_ptr + o_vo + i_v * BV, mask=m_vo, other=0.0)
        b_dw = tl.load(dv_ptr + o_vo + i_v * BV, mask=m_vo, other=0.0)
        b_r = tl.load(r_ptr + o_vo + i_v * BV, mask=m_vo, other=0.0)
        if L2NORM:
            # x_i . dx_i without the sum over K: o_i is linear in q_i, and all that follows from token i in k_i r_i^T;
            # the prediction v_i - r_i is linear in p_i, here k_i. (Of a p of its own the part through the prediction is
            # all, and too small for the digits that r_i has where it decays.)
            b_o = tl.load(o_ptr + o_vo + i_v * BV, mask=m_vo, other=0.0)
            b_dot_q += _row_sums(b_do, b_o)
            b_along_k = b_r.to(tl.float32)
            if p_ptr is None:
                b_along_k += b_r.to(tl.float32) - tl.load(v_ptr + o_vo + i_v * BV, mask=m_vo, other=0.0)
            b_dot_k += _row_sums(b_dw, b_along_k)
        b_d = tl.dot(b_do, tl.trans(b_r), acc=b_d, input_precision=PRECISION)
        b_e = tl.dot(b_dw, tl.trans(b_r), acc=b_e, input_precision=PRECISION)
    b_q = tl.load(q_ptr + o_qk, mask=m_qk, other=0.0)
    b_k = tl.load(k_ptr + o_qk, mask=m_qk, other=0.0)
    if p_ptr is not None:
        b_p = tl.load(p_ptr + o_qk, mask=m_qk, other=0.0)
    else:
        b_p = b_k
    if L2NORM:
        b_norm_q = _inverse_row_norms(b_q)
        b_norm_k = _inverse_row_norms(b_k)
        b_norm_p = _inverse_row_norms(b_p)
        tl.store(p_local + NORM_Q * C + o_i, b_norm_q)
        tl.store(p_local + NORM_K * C + o_i, b_norm_k)
        tl.store(p_local + NORM_P * C + o_i, b_norm_p)
        tl.store(p_local + DOT_Q * C + o_i, b_dot_q * b_norm_q * b_norm_q)
        tl.store(p_local + DOT_K * C + o_i, b_dot_k * b_norm_k * b_norm_k)
        b_norm_q = b_norm_q[:, None]
        b_norm_p = b_norm_p[:, None]
        b_norm_k = b_norm_k[None, :]
    else:
        b_norm_q = tl.full([C, 1], 1.0, tl.float32)
        b_norm_p = b_norm_q
        b_norm_k = tl.full([1, C], 1.0, tl.float32)

    m_below = o_i[:, None] > o_i[None, :]
    m_upto = o_i[:, None] >= o_i[None, :]
    p_low = None if low_ptr is None else low_ptr + index * (2 * C)
    b_a, b_u = decay_matrices(p_c, p_low, b_e, C)
    b_alpha = tl.load(p_row + ALPHA * C)
    b_beta = tl.load(p_row + BETA * C)
    b_g = tl.dot(b_a.to(DTYPE), (b_beta * b_u).to(DTYPE), input_precision=PRECISION)  # G'

    b_eta = tl.load(p_col + ETA * C)
    b_read = b_norm_p
    if P_TIMES_ALPHA:
        b_read = b_read * b_alpha
    b_d = tl.where(m_upto, b_d, 0.0) * (scale * b_norm_q) * b_norm_k
    b_e = tl.where(m_below, -b_e, 0.0) * b_read * b_norm_k
    b_f = _to_operand(b_d * (b_alpha * b_g + b_beta * b_u) * b_eta, b_k.dtype)
    b_h = _to_operand(b_e * b_g * b_eta, b_k.dtype)
    o_dqk = (o_t * HV + i_hv)[:, None] * K + o_k[None, :]
    if dq_ptr is not None:
        b_dq = tl.dot(b_f, b_k, input_precision=PRECISION)
        tl.store(dq_ptr + o_dqk, b_dq.to(dq_ptr.dtype.element_ty), mask=m_qk)
    if dp_ptr is not None:
        b_dp = tl.dot(b_h, b_k, input_precision=PRECISION)
        tl.store(dp_ptr + o_dqk, b_dp.to(dp_ptr.dtype.element_ty), mask=m_qk)
    if dk_ptr is not None:
        b_dk = tl.dot(tl.trans(b_h), b_p, input_precision=PRECISION)
        if p_ptr is None:
            b_dk = tl.dot(b_h, b_k, acc=b_dk, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_f), b_q, acc=b_dk, input_precision=PRECISION)
        tl.store(dk_ptr + o_dqk, b_dk.to(dk_ptr.dtype.element_ty), mask=m_qk)

    if GATES:
        # The decays again: kept from above, they would take the registers that dq and dk need.
        b_a, b_u = decay_matrices(p_c, p_low, b_e, C)
        # Gradients of G (by A_qk) and of G' (by L), without the eta of the column until its own gradient is taken.
        b_d *= tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_e *= tl.dot(b_p, tl.trans(b_k), input_precision=PRECISION)
        tl.store(p_local + LOCAL_ETA * C + o_i, tl.sum(b_d * (b_alpha * b_g + b_beta * b_u) + b_e * b_g, axis=0))
        b_d *= b_eta
        b_e *= b_eta
        if P_TIMES_ALPHA:
            b_dalpha = tl.sum((b_alpha * b_d + b_e) * b_g, axis=1)
        else:
            b_dalpha = tl.sum(b_alpha * b_d * b_g, axis=1)
        b_e += b_alpha * b_d  # gradient of G', complete
        b_beta_u = b_beta * b_u
        b_da = tl.dot(b_e.to(DTYPE), tl.trans(b_beta_u.to(DTYPE)), input_precision=PRECISION) * b_a
        b_before = tl.where(o_i[:, None] < o_i[None, :], 1.0, 0.0).to(DTYPE)
        b_da = tl.dot(b_da.to(DTYPE), b_before, input_precision=PRECISION)
        b_dalpha += tl.sum(tl.where(m_below, b_da, 0.0), axis=0)
        tl.store(p_local + LOCAL_ALPHA * C + o_i, b_dalpha)
        b_d += tl.dot(tl.trans(b_a.to(DTYPE)), b_e.to(DTYPE), input_precision=PRECISION)  # gradient of beta U, complete
        tl.store(p_local + LOCAL_BETA * C + o_i, tl.sum(b_d * b_u, axis=1))
        b_du = tl.dot(tl.where(m_below, b_d * b_beta_u, 0.0).to(DTYPE), b_before, input_precision=PRECISION)
        tl.store(p_local + LOCAL_MU * C + o_i, tl.sum(tl.where(m_upto, b_du, 0.0), axis=0))


@triton.jit(do_not_specialize=["T", "N", "NT", "first_head"])
def gradients_bwd_kernel(
    q_ptr, k_ptr, p_ptr, do_ptr, dv_ptr, r_ptr, states_ptr, dstates_ptr, coefficients_ptr, local_ptr,
    dq_ptr, dk_ptr, dp_ptr, dcoefficients_ptr, cu_seqlens_ptr,
    T, N, NT, first_head,
    H: tl.constexpr, HV: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, L2NORM: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: what goes through the states at the ends of one chunk, for BK columns of K of one value head.

    Arrays as in matrices_bwd_kernel; states, dstates: [slots, HEADS, 2, V, K]. Adds to dq, dk, dp (each unless None),
    takes the sums through the L2 norm, and writes dcoefficients [slots, HV, K tiles, N_D_ROWS, C] unless None.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    KT: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(0) % KT
    slot = tl.program_id(0) // (KT * HEADS)
    i_l = tl.program_id(0) // KT % HEADS
    i_hv = first_head + i_l
    i_h = i_hv // (HV // H)
    _, first, end, i_c = locate_chunk(cu_seqlens_ptr, slot, T, N, NT, C, VARLEN)
    if first + i_c * C >= end:
        return
    o_i = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_t = first + i_c * C + o_i
    m_t = o_t < end
    m_qk = m_t[:, None] & (o_k < K)[None, :]
    o_qk = (o_t * H + i_h)[:, None] * K + o_k[None, :]  # [C, BK] int64
    o_vo = (o_t * HV + i_hv)[:, None] * V + o_v[None, :]  # [C, BV] int64
    index = slot.to(tl.int64) * HV + i_hv
    p_row = coefficients_ptr + index * (N_ROWS * C) + o_i[:, None]
    o_dqk = (o_t * HV + i_hv)[:, None] * K + o_k[None, :]
    p_x = states_ptr + (slot.to(tl.int64) * HEADS + i_l) * (2 * V * K)
    p_dx = dstates_ptr + (slot.to(tl.int64) * HEADS + i_l) * (2 * V * K)
    p_d = dcoefficients_ptr
    if dcoefficients_ptr is not None:
        p_d += (index * KT + i_k) * (N_D_ROWS * C) + o_i
    p_local = local_ptr + index * (N_LOCAL_ROWS * C) + o_i
    p_local_row = p_local[:, None]

    # dq first, then dp and dk: one sum in registers at a time.
    b_q = tl.load(q_ptr + o_qk, mask=m_qk, other=0.0)
    b_dq = tl.zeros([C, BK], dtype=tl.float32)
    b_out_s = tl.zeros([C], dtype=tl.float32)
    b_out_n = tl.zeros([C], dtype=tl.float32)
    for i_v in tl.range(0, NV, num_stages=STAGES):
        m_v = i_v * BV + o_v < V
        m_x = m_v[:, None] & (o_k < K)[None, :]
        o_x = (i_v * BV + o_v)[:, None] * K + o_k[None, :]
        b_do = tl.load(do_ptr + o_vo + i_v * BV, mask=m_t[:, None] & m_v[None, :], other=0.0)
        b_s = tl.load(p_x + o_x, mask=m_x, other=0.0)  # [BV, BK]
        b_n = tl.load(p_x + V * K + o_x, mask=m_x, other=0.0)
        b_y = tl.dot(b_do, b_s, input_precision=PRECISION)  # [C, BK]
        b_out_s += _row_sums(b_q, b_y)
        b_dq += tl.load(p_row + OUT_S * C) * b_y
        b_y = tl.dot(b_do, b_n, input_precision=PRECISION)
        b_out_n += _row_sums(b_q, b_y)
        b_dq += tl.load(p_row + OUT_N * C) * b_y
    if dq_ptr is not None:
        _add_and_store(dq_ptr + o_dqk, p_local_row + DOT_Q * C, m_qk, b_dq, b_q, L2NORM)
    if dcoefficients_ptr is not None:
        _store_sums(p_d + D_OUT_S * C, b_out_s, p_local + NORM_Q * C, L2NORM)
        _store_sums(p_d + D_OUT_N * C, b_out_n, p_local + NORM_Q * C, L2NORM)

    b_k = tl.load(k_ptr + o_qk, mask=m_qk, other=0.0)
    b_dk = tl.zeros([C, BK], dtype=tl.float32)
    if p_ptr is not None:
        b_p = tl.load(p_ptr + o_qk, mask=m_qk, other=0.0)
        b_dp = tl.zeros([C, BK], dtype=tl.float32)
    else:
        b_p = b_k
    b_read_s = tl.zeros([C], dtype=tl.float32)
    b_read_n = tl.zeros([C], dtype=tl.float32)
    b_write_s = tl.zeros([C], dtype=tl.float32)
    b_write_n = tl.zeros([C], dtype=tl.float32)
    da_end = 0.0
    db_end = 0.0
    du_end = 0.0
    for i_v in tl.range(0, NV, num_stages=STAGES):
        m_v = i_v * BV + o_v < V
        m_vo = m_t[:, None] & m_v[None, :]
        m_x = m_v[:, None] & (o_k < K)[None, :]
        o_x = (i_v * BV + o_v)[:, None] * K + o_k[None, :]
        b_dw = tl.load(dv_ptr + o_vo + i_v * BV, mask=m_vo, other=0.0)
        b_r = tl.load(r_ptr + o_vo + i_v * BV, mask=m_vo, other=0.0)
        b_s = tl.load(p_x + o_x, mask=m_x, other=0.0)  # [BV, BK]
        b_n = tl.load(p_x + V * K + o_x, mask=m_x, other=0.0)
        b_ds = tl.load(p_dx + o_x, mask=m_x, other=0.0)
        b_dn = tl.load(p_dx + V * K + o_x, mask=m_x, other=0.0)
        if dcoefficients_ptr is not None:
            da_end += tl.sum(b_s.to(tl.float32) * b_ds)
            db_end += tl.sum(b_n.to(tl.float32) * b_ds)
            du_end += tl.sum(b_n.to(tl.float32) * b_dn)
        b_y = tl.dot(b_dw, b_s, input_precision=PRECISION)
        b_read_s -= _row_sums(b_p, b_y)
        b_y *= tl.load(p_row + READ_S * C)
        if p_ptr is not None:
            b_dp -= b_y
        else:
            b_dk -= b_y
        b_y = tl.dot(b_dw, b_n, input_precision=PRECISION)
        b_read_n -= _row_sums(b_p, b_y)
        b_y *= tl.load(p_row + READ_N * C)
        if p_ptr is not None:
            b_dp -= b_y
        else:
            b_dk -= b_y
        b_y = tl.dot(b_r, b_ds, input_precision=PRECISION)
        b_write_s += _row_sums(b_k, b_y)
        b_dk += tl.load(p_row + WRITE_S * C) * b_y
        b_y = tl.dot(b_r, b_dn, input_precision=PRECISION)
        b_write_n += _row_sums(b_k, b_y)
        b_dk += tl.load(p_row + WRITE_N * C) * b_y
    if dk_ptr is not None:
        _add_and_store(dk_ptr + o_dqk, p_local_row + DOT_K * C, m_qk, b_dk, b_k, L2NORM)
    if dp_ptr is not None:
        tl.static_assert(KT == 1, "dp needs all of K in one tile")
        b_dp += tl.load(dp_ptr + o_dqk, mask=m_qk, other=0.0)
        if L2NORM:
            b_norm = tl.load(p_local_row + NORM_P * C)
            b_dp -= b_p.to(tl.float32) * (b_norm * b_norm * _row_sums(b_p, b_dp)[:, None])
        tl.store(dp_ptr + o_dqk, b_dp.to(dp_ptr.dtype.element_ty), mask=m_qk)
    if dcoefficients_ptr is not None:
        _store_sums(p_d + D_READ_S * C, b_read_s, p_local + NORM_P * C, L2NORM)
        _store_sums(p_d + D_READ_N * C, b_read_n, p_local + NORM_P * C, L2NORM)
        _store_sums(p_d + D_WRITE_S * C, b_write_s, p_local + NORM_K * C, L2NORM)
        _store_sums(p_d + D_WRITE_N * C, b_write_n, p_local + NORM_K * C, L2NORM)
        tl.store(p_d + D_CARRY * C, tl.where(o_i == 0, da_end, tl.where(o_i == 1, db_end, du_end)))
