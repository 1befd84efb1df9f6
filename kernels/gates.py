"""Stage 1 of the chunk form: everything that depends on the gates alone, one small kernel over all chunks.

For a chunk of C tokens with decays alpha, mu (see README.md for the symbols), written per token i:

    a_i = prod_{l<=i} alpha_l,  u_i = prod_{l<=i} mu_l      decays from the state that enters the chunk
    b_i = alpha_i b_{i-1} + beta_i u_i                      how much of the entering momentum is in S_i
    g_i = beta_i A_Ci + mu_{i+1} g_{i+1}  (= G_Ci)          effect of the error at token i on S at the chunk's end
    w_i = u_C / u_i  (= U_Ci)                               the same for the momentum

b and g are linear recurrences with non-negative coefficients, done as associative scans: nothing cancels. Products of
decays are taken as exponentials of sums of base-2 logs. After strong decays these sums are large and their differences
small: for float32 inputs they are formed in float64, and handed on as two float32 numbers (the second in `low`).
"""

import triton
import triton.language as tl

from .slots import locate_chunk

LOG2E = tl.constexpr(1.4426950408889634)

# Log gates below this act as it: exp(-30) = 9e-14 is zero beside 1 in float32, and sums of up to 128 of them stay
# exact enough for their differences.
LOG_GATE_FLOOR = tl.constexpr(-30.0)

# Rows of the coefficient array [slots, HV, N_ROWS, C] float32. The scan reads the first seven, after the prepare kernel
# has multiplied the first six by the inverse norms of p, q and k.
READ_S = tl.constexpr(0)  # alpha_i a_{i-1}, or a_{i-1} if p is taken as it is: factor of p_i^T S in the prediction
READ_N = tl.constexpr(1)  # the same of b_{i-1}, for N
OUT_S = tl.constexpr(2)  # scale a_i: factor of q_i^T S in the output
OUT_N = tl.constexpr(3)  # scale b_i: the same for N
WRITE_S = tl.constexpr(4)  # eta_i g_i: factor of k_i r_i^T in the S that leaves the chunk
WRITE_N = tl.constexpr(5)  # eta_i w_i: the same for N
CARRY = tl.constexpr(6)  # a_C, b_C, u_C and the chunk's largest beta in the first four places
LOG_A = tl.constexpr(7)  # log2 a_i
LOG_U = tl.constexpr(8)  # log2 u_i
ALPHA = tl.constexpr(9)
BETA = tl.constexpr(10)
ETA = tl.constexpr(11)
N_ROWS = tl.constexpr(12)

# Rows of the array [slots, HV, K tiles, N_D_ROWS, C] float32 of the gradients of the coefficients, before these were
# multiplied by norms; the sum over the tiles counts.
D_READ_S = tl.constexpr(0)
D_READ_N = tl.constexpr(1)
D_OUT_S = tl.constexpr(2)
D_OUT_N = tl.constexpr(3)
D_WRITE_S = tl.constexpr(4)
D_WRITE_N = tl.constexpr(5)
D_CARRY = tl.constexpr(6)  # of a_C, b_C, u_C in the first three places
N_D_ROWS = tl.constexpr(7)

# Rows of the array [slots, HV, N_LOCAL_ROWS, C] float32 of what is known of a chunk before its states are: gradients of
# the gates through the chunk's matrices, inverse norms 1 / ||x_i|| of tokens, and x_i . dx_i / ||x_i||^2 of normalised
# tokens x_i / ||x_i|| with their gradients.
LOCAL_ALPHA = tl.constexpr(0)  # of log alpha
LOCAL_MU = tl.constexpr(1)  # of log mu
LOCAL_BETA = tl.constexpr(2)
LOCAL_ETA = tl.constexpr(3)
DOT_Q = tl.constexpr(4)
DOT_K = tl.constexpr(5)
NORM_Q = tl.constexpr(6)
NORM_K = tl.constexpr(7)
NORM_P = tl.constexpr(8)
N_LOCAL_ROWS = tl.constexpr(9)

TINY = tl.constexpr(1e-30)  # keeps a chunk of beta = 0 from dividing by zero


@triton.jit
def _affine(decay_1, x_1, decay_2, x_2):
    """Composition of x -> decay x + x_1 and the like."""
    return decay_1 * decay_2, x_1 * decay_2 + x_2


@triton.jit
def _decay(b_log):
    """A product of decays from its base-2 log."""
    return tl.exp2(b_log.to(tl.float32))


@triton.jit
def _log2_gate(ptr, offsets, mask):
    """A log gate in base 2 with its floor; 0 (a gate of 1) where masked. NaN stays NaN."""
    b_log = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(b_log, LOG_GATE_FLOOR, propagate_nan=tl.PropagateNan.ALL) * LOG2E


@triton.jit
def _gate(ptr, offsets, mask):
    """beta or eta, 1 where it is not given; 0 where masked."""
    if ptr is not None:
        b_gate = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        b_gate = tl.where(mask, 1.0, 0.0)
    return b_gate


@triton.jit
def _sum_tiles(p_row, mask, KT: tl.constexpr, C: tl.constexpr):
    """A row of gradients, from all tiles of K."""
    b_row = tl.load(p_row, mask=mask, other=0.0)
    for i in tl.static_range(1, KT):
        b_row += tl.load(p_row + i * (N_D_ROWS * C), mask=mask, other=0.0)
    return b_row


@triton.jit(do_not_specialize=["T", "N", "NT"])
def gates_fwd_kernel(
    log_alpha_ptr, log_mu_ptr, beta_ptr, eta_ptr, coefficients_ptr, low_ptr, cu_seqlens_ptr,
    scale, T, N, NT,
    HV: tl.constexpr, C: tl.constexpr, BH: tl.constexpr, P_TIMES_ALPHA: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One program: all coefficient rows of one chunk for BH value heads.

    Gates are [B, T, HV] of any float dtype, contiguous. Tokens after the end of a sequence count as alpha = mu = 1,
    beta = 0, eta = 0. low [slots, HV, 2, C] float32: what rows LOG_A and LOG_U lack; None where float32 sums will do.
    """
    SUM_DTYPE: tl.constexpr = tl.float32 if low_ptr is None else tl.float64
    slot = tl.program_id(0)
    _, first, end, i_c = locate_chunk(cu_seqlens_ptr, slot, T, N, NT, C, VARLEN)
    o_i = tl.arange(0, C)[:, None]
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)[None, :]
    m_h = o_h < HV
    o_t = first + i_c * C + o_i
    o_gate = o_t * HV + o_h  # [C, BH] int64
    m = (o_t < end) & m_h
    m_before = (o_t - 1 < end) & (o_i > 0) & m_h
    m_after = (o_t + 1 < end) & (o_i < C - 1) & m_h

    b_log_alpha = _log2_gate(log_alpha_ptr, o_gate, m)
    b_log_alpha_before = _log2_gate(log_alpha_ptr, o_gate - HV, m_before)
    b_log_mu = _log2_gate(log_mu_ptr, o_gate, m)
    b_log_mu_after = _log2_gate(log_mu_ptr, o_gate + HV, m_after)
    b_beta = _gate(beta_ptr, o_gate, m)
    b_beta_before = _gate(beta_ptr, o_gate - HV, m_before)
    b_eta = _gate(eta_ptr, o_gate, m)

    b_alpha = tl.exp2(b_log_alpha)
    b_log_a = tl.cumsum(b_log_alpha.to(SUM_DTYPE), axis=0)
    b_log_u = tl.cumsum(b_log_mu.to(SUM_DTYPE), axis=0)
    b_log_a_end = tl.sum(b_log_alpha.to(SUM_DTYPE), axis=0)[None, :]
    b_log_u_end = tl.sum(b_log_mu.to(SUM_DTYPE), axis=0)[None, :]
    b_u = _decay(b_log_u)
    b_a_before = _decay(b_log_a - b_log_alpha)
    b_u_before = _decay(b_log_u - b_log_mu)
    _, b_b_before = tl.associative_scan((tl.exp2(b_log_alpha_before), b_beta_before * b_u_before), 0, _affine)
    b_b = b_alpha * b_b_before + b_beta * b_u
    b_write = b_beta * _decay(b_log_a_end - b_log_a)
    _, b_g = tl.associative_scan((tl.exp2(b_log_mu_after), b_write), 0, _affine, reverse=True)
    b_b_end = tl.sum(tl.where(o_i == C - 1, b_b, 0.0), axis=0)[None, :]
    b_beta_max = tl.maximum(tl.max(b_beta, axis=0), TINY)[None, :]
    b_carry = tl.where(o_i == 0, _decay(b_log_a_end), tl.where(o_i == 1, b_b_end, _decay(b_log_u_end)))
    b_carry = tl.where(o_i == 3, b_beta_max, b_carry)

    p_rows = coefficients_ptr + (slot.to(tl.int64) * HV + o_h) * (N_ROWS * C) + o_i  # [C, BH]
    b_read = b_alpha if P_TIMES_ALPHA else tl.full([C, BH], 1.0, tl.float32)
    tl.store(p_rows + READ_S * C, b_read * b_a_before, mask=m_h)
    tl.store(p_rows + READ_N * C, b_read * b_b_before, mask=m_h)
    tl.store(p_rows + OUT_S * C, scale * (b_alpha * b_a_before), mask=m_h)
    tl.store(p_rows + OUT_N * C, scale * b_b, mask=m_h)
    tl.store(p_rows + WRITE_S * C, b_eta * b_g, mask=m_h)
    tl.store(p_rows + WRITE_N * C, b_eta * _decay(b_log_u_end - b_log_u), mask=m_h)
    tl.store(p_rows + CARRY * C, b_carry, mask=m_h)
    b_log_a_high, b_log_u_high = b_log_a.to(tl.float32), b_log_u.to(tl.float32)
    tl.store(p_rows + LOG_A * C, b_log_a_high, mask=m_h)
    tl.store(p_rows + LOG_U * C, b_log_u_high, mask=m_h)
    tl.store(p_rows + ALPHA * C, b_alpha, mask=m_h)
    tl.store(p_rows + BETA * C, b_beta, mask=m_h)
    tl.store(p_rows + ETA * C, b_eta, mask=m_h)
    if low_ptr is not None:
        p_low = low_ptr + (slot.to(tl.int64) * HV + o_h) * (2 * C) + o_i
        tl.store(p_low, (b_log_a - b_log_a_high).to(tl.float32), mask=m_h)
        tl.store(p_low + C, (b_log_u - b_log_u_high).to(tl.float32), mask=m_h)


@triton.jit(do_not_specialize=["T", "N", "NT"])
def gates_bwd_kernel(
    log_alpha_ptr, log_mu_ptr, beta_ptr, eta_ptr, dcoefficients_ptr, local_ptr,
    dlog_alpha_ptr, dlog_mu_ptr, dbeta_ptr, deta_ptr, cu_seqlens_ptr,
    scale, T, N, NT,
    HV: tl.constexpr, C: tl.constexpr, BH: tl.constexpr, KT: tl.constexpr,
    P_TIMES_ALPHA: tl.constexpr, VARLEN: tl.constexpr, SUM_DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of the gates of one chunk for BH value heads. Each result may be None.

    Goes backward through the recurrences of the forward kernel. A product of decays gives its gradient, times itself,
    to every log gate in it: sums over the tokens after (before) a gate. All terms are products, so that a gate of 0
    gets the exact value, and no two sums are subtracted.
    """
    slot = tl.program_id(0)
    _, first, end, i_c = locate_chunk(cu_seqlens_ptr, slot, T, N, NT, C, VARLEN)
    if first + i_c * C >= end:
        return
    o_i = tl.arange(0, C)[:, None]
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)[None, :]
    m_h = o_h < HV
    o_t = first + i_c * C + o_i
    o_gate = o_t * HV + o_h  # [C, BH] int64
    m = (o_t < end) & m_h
    m_before = (o_t - 1 < end) & (o_i > 0) & m_h
    m_after = (o_t + 1 < end) & (o_i < C - 1) & m_h
    is_last = o_i == C - 1

    b_log_alpha = _log2_gate(log_alpha_ptr, o_gate, m)
    b_log_alpha_before = _log2_gate(log_alpha_ptr, o_gate - HV, m_before)
    b_log_alpha_after = _log2_gate(log_alpha_ptr, o_gate + HV, m_after)
    b_log_mu = _log2_gate(log_mu_ptr, o_gate, m)
    b_log_mu_before = _log2_gate(log_mu_ptr, o_gate - HV, m_before)
    b_log_mu_after = _log2_gate(log_mu_ptr, o_gate + HV, m_after)
    b_beta = _gate(beta_ptr, o_gate, m)
    b_beta_before = _gate(beta_ptr, o_gate - HV, m_before)
    b_eta = _gate(eta_ptr, o_gate, m)
    b_eta_before = _gate(eta_ptr, o_gate - HV, m_before)

    # The forward's recurrences again.
    b_alpha = tl.exp2(b_log_alpha)
    b_alpha_after = tl.exp2(b_log_alpha_after)
    b_mu = tl.exp2(b_log_mu)
    b_log_a = tl.cumsum(b_log_alpha.to(SUM_DTYPE), axis=0)
    b_log_u = tl.cumsum(b_log_mu.to(SUM_DTYPE), axis=0)
    b_a = _decay(b_log_a)
    b_u = _decay(b_log_u)
    b_log_a_end = tl.sum(b_log_alpha.to(SUM_DTYPE), axis=0)[None, :]
    b_log_u_end = tl.sum(b_log_mu.to(SUM_DTYPE), axis=0)[None, :]
    b_u_before = _decay(b_log_u - b_log_mu)
    _, b_b_before = tl.associative_scan((tl.exp2(b_log_alpha_before), b_beta_before * b_u_before), 0, _affine)
    b_a_to_end = _decay(b_log_a_end - b_log_a)
    b_w = _decay(b_log_u_end - b_log_u)
    _, b_g = tl.associative_scan((tl.exp2(b_log_mu_after), b_beta * b_a_to_end), 0, _affine, reverse=True)

    p_d = dcoefficients_ptr + (slot.to(tl.int64) * HV + o_h) * (KT * N_D_ROWS * C) + o_i  # [C, BH]
    p_local = local_ptr + (slot.to(tl.int64) * HV + o_h) * (N_LOCAL_ROWS * C) + o_i
    m_next = (o_i < C - 1) & m_h
    m_previous = (o_i > 0) & m_h
    b_d_read_s = _sum_tiles(p_d + D_READ_S * C, m_h, KT, C)
    b_d_read_s_next = _sum_tiles(p_d + (D_READ_S * C + 1), m_next, KT, C)
    b_d_read_n = _sum_tiles(p_d + D_READ_N * C, m_h, KT, C)
    b_d_read_n_next = _sum_tiles(p_d + (D_READ_N * C + 1), m_next, KT, C)
    b_d_out_s = _sum_tiles(p_d + D_OUT_S * C, m_h, KT, C)
    b_d_out_n = _sum_tiles(p_d + D_OUT_N * C, m_h, KT, C)
    b_d_write_s = _sum_tiles(p_d + D_WRITE_S * C, m_h, KT, C)
    b_d_write_s_before = _sum_tiles(p_d + (D_WRITE_S * C - 1), m_previous, KT, C)
    b_d_write_n = _sum_tiles(p_d + D_WRITE_N * C, m_h, KT, C)
    b_d_write_n_before = _sum_tiles(p_d + (D_WRITE_N * C - 1), m_previous, KT, C)
    p_carry = p_d - o_i + D_CARRY * C
    b_d_a_end = _sum_tiles(p_carry, m_h, KT, C)
    b_d_b_end = _sum_tiles(p_carry + 1, m_h, KT, C)
    b_d_u_end = _sum_tiles(p_carry + 2, m_h, KT, C)

    # a_i, in out_s, in the read of this token (tied p) or the next, and at the chunk's end
    if P_TIMES_ALPHA:
        b_da = scale * b_d_out_s + b_d_read_s
        b_read_next = b_alpha_after
    else:
        b_da = scale * b_d_out_s + b_d_read_s_next
        b_read_next = tl.full([C, BH], 1.0, tl.float32)
    b_da = b_a * (b_da + tl.where(is_last, b_d_a_end, 0.0))
    # b_i = alpha_i b_{i-1} + beta_i u_i
    b_db = scale * b_d_out_n + b_read_next * b_d_read_n_next + tl.where(is_last, b_d_b_end, 0.0)
    _, b_db = tl.associative_scan((b_alpha_after, b_db), 0, _affine, reverse=True)
    b_dalpha_b = b_db
    if P_TIMES_ALPHA:
        b_dalpha_b += b_d_read_n
    b_du = b_u * (b_beta * b_db + tl.where(is_last, b_d_u_end, 0.0))
    # g_i = beta_i A_Ci + mu_{i+1} g_{i+1}, and w_i; "before" is of the token before, which gates of this one decay
    b_dg_before = b_eta_before * b_d_write_s_before
    _, b_dg_before = tl.associative_scan((tl.exp2(b_log_mu_before), b_dg_before), 0, _affine)
    b_dg = b_eta * b_d_write_s + b_mu * b_dg_before
    b_da_to_end = b_dg_before * b_beta_before * b_alpha * b_a_to_end
    b_dw = b_eta_before * b_d_write_n_before * b_mu * b_w

    if dlog_alpha_ptr is not None:
        b_out = tl.load(p_local + LOCAL_ALPHA * C, mask=m_h, other=0.0) + b_alpha * b_b_before * b_dalpha_b
        b_out += tl.cumsum(b_da, axis=0, reverse=True)
        b_out += tl.cumsum(b_da_to_end, axis=0)
        b_out = tl.where(b_log_alpha <= LOG_GATE_FLOOR * LOG2E, 0.0, b_out)
        tl.store(dlog_alpha_ptr + o_gate, b_out.to(dlog_alpha_ptr.dtype.element_ty), mask=m)
    if dlog_mu_ptr is not None:
        b_out = tl.load(p_local + LOCAL_MU * C, mask=m_h, other=0.0) + b_mu * b_dg_before * b_g
        b_out += tl.cumsum(b_du, axis=0, reverse=True)
        b_out += tl.cumsum(b_dw, axis=0)
        b_out = tl.where(b_log_mu <= LOG_GATE_FLOOR * LOG2E, 0.0, b_out)
        tl.store(dlog_mu_ptr + o_gate, b_out.to(dlog_mu_ptr.dtype.element_ty), mask=m)
    if dbeta_ptr is not None:
        b_out = tl.load(p_local + LOCAL_BETA * C, mask=m_h, other=0.0) + b_db * b_u + b_dg * b_a_to_end
        tl.store(dbeta_ptr + o_gate, b_out.to(dbeta_ptr.dtype.element_ty), mask=m)
    if deta_ptr is not None:
        b_out = tl.load(p_local + LOCAL_ETA * C, mask=m_h, other=0.0) + b_d_write_s * b_g + b_d_write_n * b_w
        tl.store(deta_ptr + o_gate, b_out.to(deta_ptr.dtype.element_ty), mask=m)
