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
    """A log gate in base 2 with its floor; 0 (a gate of 1) where masked."""
    return tl.maximum(tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32), LOG_GATE_FLOOR) * LOG2E


@triton.jit(do_not_specialize=["T", "N", "NT"])
def gates_fwd_kernel(
    log_alpha_ptr, log_mu_ptr, beta_ptr, eta_ptr, coefficients_ptr, low_ptr, cu_seqlens_ptr,
    scale, T, N, NT,
    HV: tl.constexpr, C: tl.constexpr, BH: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_ETA: tl.constexpr, P_TIMES_ALPHA: tl.constexpr, VARLEN: tl.constexpr,
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
    if HAS_BETA:
        b_beta = tl.load(beta_ptr + o_gate, mask=m, other=0.0).to(tl.float32)
        b_beta_before = tl.load(beta_ptr + o_gate - HV, mask=m_before, other=0.0).to(tl.float32)
    else:
        b_beta = tl.where(m, 1.0, 0.0)
        b_beta_before = tl.where(m_before, 1.0, 0.0)
    if HAS_ETA:
        b_eta = tl.load(eta_ptr + o_gate, mask=m, other=0.0).to(tl.float32)
    else:
        b_eta = tl.where(m, 1.0, 0.0)

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
