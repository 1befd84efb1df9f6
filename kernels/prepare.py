"""Stage 2 of the chunk form: the two [C, C] matrices of every chunk, all chunks at once.

    A'_il = prod_{l<m<i} alpha_m   (i > l, else 0)      G' = A' diag(beta) U      (G'_ij = G_{i-1,j})
    L     = (P K^T) * (alpha G') * eta_j                T = (I + L)^-1            "inverse"
    A_qk  = scale (Q K^T) * (alpha G' + beta U) * eta_j                           "attention"

Q, K, P are taken as they come; their inverse norms are scalars a row and are multiplied into L, A_qk and coefficients.

The inverse: blocks of 8 on the diagonal by forward substitution in float32, all of them at once in registers, then
neighbours are merged, (8 -> 16 -> ... -> C), by T <- T - T (L_off T), where L_off holds the blocks of L between the two
halves of every pair. Substitution and block merges are stable where powers of L (Neumann doubling) cancel: for equal
keys and eta = 2 the powers of a block reach 1e6 while its inverse stays at 2.
"""

import triton
import triton.language as tl

from .gates import ALPHA, BETA, CARRY, ETA, LOG_A, LOG_U, N_ROWS, OUT_N, OUT_S, READ_N
from .reference import L2NORM_EPS
from .slots import locate_chunk

SUBSTITUTION = tl.constexpr(8)  # block size up to which substitution is used
EPS = tl.constexpr(L2NORM_EPS)


@triton.jit
def _merge(b_l, b_t, C: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Inverse with diagonal blocks of 2W from the inverse b_t [C, C] with diagonal blocks of W."""
    o_i = tl.arange(0, C)
    block_i = (o_i // W)[:, None]
    block_j = (o_i // W)[None, :]
    b_off = tl.where((block_i == block_j + 1) & (block_j % 2 == 0), b_l, 0.0).to(DTYPE)
    b_half = b_t.to(DTYPE)
    b_off = tl.dot(b_off, b_half, input_precision=PRECISION).to(DTYPE)
    return b_t - tl.dot(b_half, b_off, input_precision=PRECISION)


@triton.jit
def invert_unit_lower(b_l, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 for a strictly lower triangular b_l [C, C] float32; products of blocks take operands in DTYPE."""
    W: tl.constexpr = SUBSTITUTION
    NB: tl.constexpr = C // W
    o_i = tl.arange(0, C)
    m_block = (o_i // W)[:, None] == (o_i // W)[None, :]
    b_block = tl.sum(tl.reshape(tl.where(m_block, b_l, 0.0), [C, NB, W]), axis=1)
    b_block = tl.reshape(b_block, [NB, W, W])
    o_row = tl.arange(0, W)[None, :, None]
    o_col = tl.arange(0, W)[None, None, :]
    b_x = tl.where(o_row == o_col, 1.0, 0.0) + tl.zeros([NB, W, W], dtype=tl.float32)
    for j in tl.static_range(W - 1):  # row j is final: take it out of the rows below
        b_row = tl.sum(tl.where(o_row == j, b_x, 0.0), axis=1, keep_dims=True)
        b_col = tl.sum(tl.where(o_col == j, b_block, 0.0), axis=2, keep_dims=True)
        b_x -= b_col * b_row
    b_t = tl.reshape(tl.broadcast_to(tl.reshape(b_x, [C, 1, W]), [C, NB, W]), [C, C])
    b_t = tl.where(m_block, b_t, 0.0)
    if C > W:
        b_t = _merge(b_l, b_t, C, W, DTYPE, PRECISION)
    if C > 2 * W:
        b_t = _merge(b_l, b_t, C, 2 * W, DTYPE, PRECISION)
    if C > 4 * W:
        b_t = _merge(b_l, b_t, C, 4 * W, DTYPE, PRECISION)
    if C > 8 * W:
        b_t = _merge(b_l, b_t, C, 8 * W, DTYPE, PRECISION)
    return b_t


@triton.jit
def _inverse_norm(b_xx, o_i):
    """1 / ||x_i|| for every row from the products b_xx = X X^T [C, C]."""
    return tl.rsqrt(tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_xx, 0.0), axis=1) + EPS)


@triton.jit
def decay_matrices(p_c, p_low, b_product, C: tl.constexpr):
    """A' and U of a chunk, from its coefficients at p_c and what their logs lack at p_low, unless None.

    b_product is any product of the chunk [C, C], and nothing needs its value (NaN where a key is not finite, after
    which nothing is): it makes the compiler compute the decays in the registers where products are, instead of
    exchanging them through shared memory (44 of 170 us of the prepare kernel on an H200).
    """
    o_i = tl.arange(0, C)
    p_row = p_c + o_i[:, None]
    p_col = p_c + o_i[None, :]
    m_first = o_i[:, None] > 0
    b_anchor = b_product * 0.0
    b_log_a = tl.load(p_row + (LOG_A * C - 1), mask=m_first, other=0.0) - tl.load(p_col + LOG_A * C) + b_anchor
    b_log_u = tl.load(p_row + LOG_U * C) - tl.load(p_col + LOG_U * C) + b_anchor
    if p_low is not None:
        b_log_a += tl.load(p_low + o_i[:, None] - 1, mask=m_first, other=0.0) - tl.load(p_low + o_i[None, :])
        b_log_u += tl.load(p_low + C + o_i[:, None]) - tl.load(p_low + C + o_i[None, :])
    b_a = tl.where(o_i[:, None] > o_i[None, :], tl.exp2(b_log_a), 0.0)
    b_u = tl.where(o_i[:, None] >= o_i[None, :], tl.exp2(b_log_u), 0.0)
    return b_a, b_u


@triton.jit(do_not_specialize=["T", "N", "NT"])
def prepare_fwd_kernel(
    q_ptr, k_ptr, p_ptr, inverse_ptr, attention_ptr, coefficients_ptr, low_ptr, cu_seqlens_ptr,
    scale, T, N, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    P_TIMES_ALPHA: tl.constexpr, L2NORM: tl.constexpr, VARLEN: tl.constexpr,
    SOLVE_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: inverse and attention [C, C] of one chunk and value head; scales its coefficients by the norms.

    Without inverse (None), in the backward, attention alone: the coefficients are scaled already.

    q, k, p: [tokens, H, K] contiguous; p None where it is k. inverse, attention: [slots, HV, C, C] in q's dtype. low:
    of the gates kernel.
    """
    slot = tl.program_id(0) // HV
    i_hv = tl.program_id(0) % HV
    i_h = i_hv // (HV // H)
    _, first, end, i_c = locate_chunk(cu_seqlens_ptr, slot, T, N, NT, C, VARLEN)
    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_t = first + i_c * C + o_i
    m_t = o_t < end
    o_tile = (o_t * H + i_h)[:, None] * K + o_k[None, :]  # [C, BK] int64
    m_tile = m_t[:, None] & (o_k < K)[None, :]
    b_q = tl.load(q_ptr + o_tile, mask=m_tile, other=0.0)
    b_k = tl.load(k_ptr + o_tile, mask=m_tile, other=0.0)
    index = slot.to(tl.int64) * HV + i_hv
    p_c = coefficients_ptr + index * (N_ROWS * C)
    p_row = p_c + o_i[:, None]
    p_col = p_c + o_i[None, :]

    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if p_ptr is not None:
        b_p = tl.load(p_ptr + o_tile, mask=m_tile, other=0.0)
        b_pk = tl.dot(b_p, tl.trans(b_k), input_precision=PRECISION)
    else:
        b_pk = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    if L2NORM:
        b_norm_q = _inverse_norm(tl.dot(b_q, tl.trans(b_q), input_precision=PRECISION), o_i)
        if p_ptr is not None:
            b_norm_k = _inverse_norm(tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION), o_i)
            b_norm_p = _inverse_norm(tl.dot(b_p, tl.trans(b_p), input_precision=PRECISION), o_i)
        else:
            b_norm_k = _inverse_norm(b_pk, o_i)
            b_norm_p = b_norm_k
        if inverse_ptr is not None:
            o_row = tl.arange(0, 8)[:, None]  # the rows that the scan reads, and one more
            p_scan = p_c + o_row * C + o_i[None, :]
            b_norm = tl.where(o_row <= READ_N, b_norm_p[None, :], b_norm_k[None, :])
            b_norm = tl.where((o_row == OUT_S) | (o_row == OUT_N), b_norm_q[None, :], b_norm)
            b_norm = tl.where(o_row < CARRY, b_norm, 1.0)
            tl.store(p_scan, tl.load(p_scan) * b_norm)

    b_beta_max = tl.load(p_c + CARRY * C + 3)
    b_a, b_u = decay_matrices(p_c, None if low_ptr is None else low_ptr + index * (2 * C), b_pk, C)
    b_a *= tl.load(p_col + BETA * C) / b_beta_max
    b_g = tl.dot(b_a.to(SOLVE_DTYPE), b_u.to(SOLVE_DTYPE), input_precision=PRECISION)

    b_eta = tl.load(p_col + ETA * C)
    b_alpha = tl.load(p_row + ALPHA * C) * b_beta_max
    b_beta = tl.load(p_row + BETA * C)
    if P_TIMES_ALPHA:
        b_read = b_alpha
    else:
        b_read = tl.full([C, 1], 1.0, tl.float32) * b_beta_max
    if L2NORM:
        b_eta *= b_norm_k[None, :]
        b_read *= b_norm_p[:, None]
        b_alpha *= b_norm_q[:, None]
        b_beta *= b_norm_q[:, None]
    b_g *= b_eta
    b_u *= b_eta
    b_attention = (scale * b_alpha * b_g + scale * b_beta * b_u) * b_qk
    o_square = index * (C * C) + o_i[:, None] * C + o_i[None, :]
    tl.store(attention_ptr + o_square, b_attention.to(attention_ptr.dtype.element_ty))
    if inverse_ptr is not None:
        b_t = invert_unit_lower(b_read * b_g * b_pk, C, SOLVE_DTYPE, PRECISION)
        tl.store(inverse_ptr + o_square, b_t.to(inverse_ptr.dtype.element_ty))
