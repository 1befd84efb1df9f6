"""Stage 3 of the chunk form: the recurrence from chunk to chunk, and the output.

    W  = V - (read_s * P S) - (read_n * P N)            R = T W
    O  = (out_s * Q S) + (out_n * Q N) + A_qk R
    S' = a_C S + b_C N + K^T (write_s * R)              N' = u_C N + K^T (write_n * R)

A program carries a tile of S and N for BV value columns through all chunks of a sequence. The state is kept transposed,
as one float32 tile X [2 BV, K] whose rows alternate between S and N in groups of eight: in the accumulator layout of
the tensor cores a thread then holds row r of S and row r of N, so S and N mix in registers, and X is the left operand
of its products from registers (with eight warps and BV <= 32 from shared memory, see `scan_shared_memory`). W and R
have BV rows only; they are doubled to fill the tensor core's tile.
"""

import triton
import triton.language as tl

from .gates import CARRY, N_ROWS, OUT_S, READ_S, WRITE_S
from .slots import sequence_bounds


@triton.jit
def _sum_pairs(b_x, NB: tl.constexpr, N: tl.constexpr):
    """S row + N row of a tile [16 NB, N]: [NB, 1, 8, N]."""
    return tl.sum(tl.reshape(b_x, [NB, 2, 8, N]), axis=1, keep_dims=True)


@triton.jit
def _double(b_x, NB: tl.constexpr, N: tl.constexpr):
    """Each row of [NB, 1, 8, N] as S row and as N row: [16 NB, N]."""
    return tl.reshape(tl.broadcast_to(b_x, [NB, 2, 8, N]), [16 * NB, N])


@triton.jit
def _rows(b_c, NB: tl.constexpr, C: tl.constexpr):
    """Coefficients [2, C] of S and of N, for every row of X: [16 NB, C]."""
    return tl.reshape(tl.broadcast_to(tl.reshape(b_c, [1, 2, 1, C]), [NB, 2, 8, C]), [16 * NB, C])


@triton.jit(do_not_specialize=["T", "N", "NT"])
def scan_fwd_kernel(
    q_ptr, k_ptr, p_ptr, v_ptr, inverse_ptr, attention_ptr, coefficients_ptr, initial_state_ptr,
    o_ptr, final_state_ptr, cu_seqlens_ptr,
    T, N, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    FREE_P: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BV value columns of one value head of one sequence, from its first chunk to its last.

    q, k, p: [tokens, H, K]; v, o: [tokens, HV, V]; states [2, N, HV, K, V] (S, then M = -N); all contiguous.
    """
    NB: tl.constexpr = BV // 8
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = tl.program_id(0) // (NV * HV)
    i_hv = tl.program_id(0) // NV % HV
    i_h = i_hv // (HV // H)
    first, end, slot = sequence_bounds(cu_seqlens_ptr, i_n, T, NT, C, VARLEN)
    length = (end - first).to(tl.int32)

    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_r = tl.arange(0, 2 * BV)
    is_n = (o_r // 8 % 2 == 1)[:, None]
    o_rv = i_v * BV + (o_r // 16 * 8 + o_r % 8)  # value column of a row of X
    m_k = o_k < K
    m_v = o_v < V

    sign = tl.where(is_n, -1.0, 1.0)  # M = -N
    o_state = ((i_n.to(tl.int64) * HV + i_hv) * K + o_k)[None, :] * V + o_rv[:, None]
    o_state += tl.where(is_n, N.to(tl.int64) * (HV * K * V), 0)
    m_state = m_k[None, :] & (o_rv < V)[:, None]
    if HAS_INITIAL:
        b_x = sign * tl.load(initial_state_ptr + o_state, mask=m_state, other=0.0).to(tl.float32)
    else:
        b_x = tl.zeros([2 * BV, BK], dtype=tl.float32)

    o_qk = o_i[:, None] * (H * K) + o_k[None, :]
    o_vo = o_i[:, None] * (HV * V) + o_v[None, :]
    o_pair = tl.arange(0, 2)[:, None] * C + o_i[None, :]  # a row for S and the row for N after it
    o_square = o_i[:, None] * C + o_i[None, :]
    p_q = q_ptr + (first * H + i_h) * K  # of the first chunk; they advance with the chunks
    p_k = k_ptr + (first * H + i_h) * K
    p_p = p_k
    if FREE_P:
        p_p = p_ptr + (first * H + i_h) * K
    p_v = v_ptr + (first * HV + i_hv) * V
    p_o = o_ptr + (first * HV + i_hv) * V
    index = slot * HV + i_hv
    p_t = inverse_ptr + index * (C * C)
    p_a = attention_ptr + index * (C * C)
    p_c = coefficients_ptr + index * (N_ROWS * C)
    for i_c in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        m_t = i_c * C + o_i < length
        m_qk = m_t[:, None] & m_k[None, :]
        m_vo = m_t[:, None] & m_v[None, :]
        b_k = tl.load(p_k + o_qk, mask=m_qk, other=0.0)  # [C, BK]
        b_q = tl.load(p_q + o_qk, mask=m_qk, other=0.0)
        b_p = b_k
        if FREE_P:
            b_p = tl.load(p_p + o_qk, mask=m_qk, other=0.0)
        b_v = tl.load(p_v + o_vo, mask=m_vo, other=0.0)  # [C, BV]
        b_t = tl.load(p_t + o_square)  # [C, C]
        b_a = tl.load(p_a + o_square)

        b_state = b_x.to(b_k.dtype)
        b_y = tl.dot(b_state, tl.trans(b_p), input_precision=PRECISION)  # [2BV, C]
        b_y *= _rows(tl.load(p_c + READ_S * C + o_pair), NB, C)
        b_w = tl.reshape(tl.trans(b_v).to(tl.float32), [NB, 1, 8, C]) - _sum_pairs(b_y, NB, C)
        b_w = _double(b_w, NB, C).to(b_t.dtype)
        b_r = tl.dot(b_w, tl.trans(b_t), input_precision=PRECISION)  # [2BV, C]
        b_o = tl.dot(b_state, tl.trans(b_q), input_precision=PRECISION)
        b_o *= _rows(tl.load(p_c + OUT_S * C + o_pair), NB, C)
        b_half = tl.where(is_n, 0.0, b_r).to(b_a.dtype)  # R once, in the rows of S
        b_o = tl.dot(b_half, tl.trans(b_a), acc=b_o, input_precision=PRECISION)
        b_out = tl.trans(tl.reshape(_sum_pairs(b_o, NB, C), [BV, C]))
        tl.store(p_o + o_vo, b_out.to(o_ptr.dtype.element_ty), mask=m_vo)

        b_r *= _rows(tl.load(p_c + WRITE_S * C + o_pair), NB, C)
        p_carry = p_c + CARRY * C
        b_s, b_n = tl.split(tl.permute(tl.reshape(b_x, [NB, 2, 8, BK]), (0, 2, 3, 1)))
        b_s = tl.load(p_carry) * b_s + tl.load(p_carry + 1) * b_n
        b_n = tl.load(p_carry + 2) * b_n
        b_x = tl.reshape(tl.permute(tl.join(b_s, b_n), (0, 3, 1, 2)), [2 * BV, BK])
        b_x = tl.dot(b_r.to(b_k.dtype), b_k, acc=b_x, input_precision=PRECISION)

        p_q += C * H * K
        p_k += C * H * K
        p_p += C * H * K
        p_v += C * HV * V
        p_o += C * HV * V
        p_t += HV * C * C
        p_a += HV * C * C
        p_c += HV * N_ROWS * C

    if STORE_FINAL:
        tl.store(final_state_ptr + o_state, sign * b_x, mask=m_state)
