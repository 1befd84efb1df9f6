"""Stage 3 of the chunk form: the recurrence from chunk to chunk, and the output.

    W  = V - (read_s * P S) - (read_n * P N)            R = T W
    O  = (out_s * Q S) + (out_n * Q N) + A_qk R
    S' = a_C S + b_C N + K^T (write_s * R)              N' = u_C N + K^T (write_n * R)

and in reverse, from the gradients dS, dN of the states that leave a chunk to those of the states that enter it:

    dR   = A_qk^T dO + write_s * K dS + write_n * K dN         dV = dW = T^T dR
    dS_0 = a_C dS + Q^T (out_s * dO) - P^T (read_s * dW)
    dN_0 = b_C dS + u_C dN + Q^T (out_n * dO) - P^T (read_n * dW)

A program carries the tile X of pairs.py, of BV value columns, through all chunks of a sequence. A slice of X is the
left operand of its products from registers (with eight warps and BV <= 32 from shared memory, see
`scan_shared_memory`).
"""

import triton
import triton.language as tl

from .gates import CARRY, N_ROWS, OUT_S, READ_S, WRITE_S
from .pairs import (
    SLICE,
    chunk_state_tile,
    double_rows,
    join_rows,
    leave_chunk,
    load_slices,
    load_state,
    rows_of_n,
    scale_rows,
    split_rows,
    store_state,
    sum_pairs,
    value_columns,
)
from .slots import sequence_bounds


@triton.jit(do_not_specialize=["T", "N", "NT"])
def scan_fwd_kernel(
    q_ptr, k_ptr, p_ptr, v_ptr, inverse_ptr, attention_ptr, coefficients_ptr, initial_state_ptr,
    o_ptr, errors_ptr, final_state_ptr, cu_seqlens_ptr,
    T, N, NT,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BV value columns of one value head of one sequence, from its first chunk to its last.

    q, k, p: [tokens, H, K]; v, o: [tokens, HV, V]; states [2, N, HV, K, V] (S, then M = -N); all contiguous.
    """
    NB: tl.constexpr = BV // 8
    BS: tl.constexpr = BK if BK < SLICE else SLICE
    NS: tl.constexpr = (K + BS - 1) // BS
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = tl.program_id(0) // (NV * HV)
    i_hv = tl.program_id(0) // NV % HV
    i_h = i_hv // (HV // H)
    first, end, slot = sequence_bounds(cu_seqlens_ptr, i_n, T, NT, C, VARLEN)
    length = (end - first).to(tl.int32)

    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BS)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    b_x = load_state(initial_state_ptr, i_n, i_hv, o_k, i_v, N, HV, K, V, NS, BS, BV)

    o_qk = o_i[:, None] * (H * K) + o_k[None, :]
    o_vo = o_i[:, None] * (HV * V) + o_v[None, :]
    o_pair = tl.arange(0, 2)[:, None] * C + o_i[None, :]  # a row for S and the row for N after it
    o_square = o_i[:, None] * C + o_i[None, :]
    is_n = rows_of_n(BV)
    p_q = q_ptr + (first * H + i_h) * K  # of the first chunk; they advance with the chunks
    p_k = k_ptr + (first * H + i_h) * K
    p_p = p_k
    if p_ptr is not None:
        p_p = p_ptr + (first * H + i_h) * K
    p_v = v_ptr + (first * HV + i_hv) * V
    o_out = (first * HV + i_hv) * V
    index = slot * HV + i_hv
    p_t = inverse_ptr + index * (C * C)
    if o_ptr is not None:
        p_a = attention_ptr + index * (C * C)
    p_c = coefficients_ptr + index * (N_ROWS * C)
    for i_c in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        m_t = i_c * C + o_i < length
        m_vo = m_t[:, None] & m_v[None, :]
        b_k = load_slices(p_k + o_qk, m_t, o_k, K, NS, BS)  # [C, BS] each
        if o_ptr is not None:
            b_q = load_slices(p_q + o_qk, m_t, o_k, K, NS, BS)
        b_p = b_k
        if p_ptr is not None:
            b_p = load_slices(p_p + o_qk, m_t, o_k, K, NS, BS)
        b_v = tl.load(p_v + o_vo, mask=m_vo, other=0.0)  # [C, BV]
        b_t = tl.load(p_t + o_square)  # [C, C]
        if o_ptr is not None:
            b_a = tl.load(p_a + o_square)

        b_y = tl.zeros([2 * BV, C], dtype=tl.float32)
        b_o = tl.zeros([2 * BV, C], dtype=tl.float32)
        for s in tl.static_range(NS):
            b_state = b_x[s].to(b_t.dtype)
            b_y = tl.dot(b_state, tl.trans(b_p[s]), acc=b_y, input_precision=PRECISION)
            if o_ptr is not None:
                b_o = tl.dot(b_state, tl.trans(b_q[s]), acc=b_o, input_precision=PRECISION)
        b_y *= scale_rows(tl.load(p_c + READ_S * C + o_pair), NB, C)
        b_w = tl.reshape(tl.trans(b_v).to(tl.float32), [NB, 1, 8, C]) - sum_pairs(b_y, NB, C)
        b_w = double_rows(b_w, NB, C).to(b_t.dtype)
        b_r = tl.dot(b_w, tl.trans(b_t), input_precision=PRECISION)  # [2BV, C]
        if errors_ptr is not None:
            b_errors = tl.trans(tl.reshape(sum_pairs(0.5 * b_r, NB, C), [BV, C]))
            tl.store(errors_ptr + o_out + o_vo, b_errors.to(errors_ptr.dtype.element_ty), mask=m_vo)
        if o_ptr is not None:
            b_o *= scale_rows(tl.load(p_c + OUT_S * C + o_pair), NB, C)
            # R stands in the rows of S and again in those of N, and their sum is put out: one of them is enough.
            b_once = tl.where(is_n, 0.0, b_r).to(b_a.dtype)
            b_o = tl.dot(b_once, tl.trans(b_a), acc=b_o, input_precision=PRECISION)
            b_out = tl.trans(tl.reshape(sum_pairs(b_o, NB, C), [BV, C]))
            tl.store(o_ptr + o_out + o_vo, b_out.to(o_ptr.dtype.element_ty), mask=m_vo)

        b_r *= scale_rows(tl.load(p_c + WRITE_S * C + o_pair), NB, C)
        b_r = b_r.to(b_t.dtype)
        b_next = ()
        for s in tl.static_range(NS):
            b_left = leave_chunk(b_x[s], p_c + CARRY * C, NB, BS)
            b_next += (tl.dot(b_r, b_k[s], acc=b_left, input_precision=PRECISION),)
        b_x = b_next

        p_q += C * H * K
        p_k += C * H * K
        p_p += C * H * K
        p_v += C * HV * V
        o_out += C * HV * V
        p_t += HV * C * C
        if o_ptr is not None:
            p_a += HV * C * C
        p_c += HV * N_ROWS * C

    if final_state_ptr is not None:
        store_state(final_state_ptr, b_x, i_n, i_hv, o_k, i_v, N, HV, K, V, NS, BS, BV)


@triton.jit(do_not_specialize=["T", "N", "NT", "first_head"])
def scan_bwd_kernel(
    q_ptr, k_ptr, p_ptr, do_ptr, inverse_ptr, attention_ptr, coefficients_ptr, dfinal_state_ptr,
    dv_ptr, dstates_ptr, dinitial_state_ptr, cu_seqlens_ptr,
    T, N, NT, first_head,
    H: tl.constexpr, HV: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BV value columns of one of HEADS value heads from first_head, from the last chunk to the first.

    q, k, p: [tokens, H, K]; do, dv: [tokens, HV, V]; dfinal_state (None for zeros) and dinitial_state (None where not
    wanted): [2, N, HV, K, V], of S and M; dstates: [slots, HEADS, 2, V, K], the gradients of S and N that arrive at
    the end of every chunk, or None; all contiguous. dv is dW, the gradient of V and of the errors before T.
    """
    NB: tl.constexpr = BV // 8
    BS: tl.constexpr = BK if BK < SLICE else SLICE
    NS: tl.constexpr = (K + BS - 1) // BS
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = tl.program_id(0) // (NV * HEADS)
    i_l = tl.program_id(0) // NV % HEADS
    i_hv = first_head + i_l
    i_h = i_hv // (HV // H)
    first, end, slot = sequence_bounds(cu_seqlens_ptr, i_n, T, NT, C, VARLEN)
    length = (end - first).to(tl.int32)
    chunks = tl.cdiv(length, C)

    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BS)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    b_x = load_state(dfinal_state_ptr, i_n, i_hv, o_k, i_v, N, HV, K, V, NS, BS, BV)

    o_qk = o_i[:, None] * (H * K) + o_k[None, :]
    o_vo = o_i[:, None] * (HV * V) + o_v[None, :]
    o_pair = tl.arange(0, 2)[:, None] * C + o_i[None, :]
    o_square = o_i[:, None] * C + o_i[None, :]
    o_kept = chunk_state_tile(o_k, i_v, K, V, BV)
    m_rows = value_columns(i_v, BV) < V
    is_n = rows_of_n(BV)
    last = chunks - 1
    start = first + last.to(tl.int64) * C
    slot += last
    p_q = q_ptr + (start * H + i_h) * K  # of the last chunk; they go back with the chunks
    p_k = k_ptr + (start * H + i_h) * K
    p_p = p_k
    if p_ptr is not None:
        p_p = p_ptr + (start * H + i_h) * K
    p_do = do_ptr + (start * HV + i_hv) * V
    p_dv = dv_ptr + (start * HV + i_hv) * V
    index = slot * HV + i_hv
    p_t = inverse_ptr + index * (C * C)
    p_a = attention_ptr + index * (C * C)
    p_c = coefficients_ptr + index * (N_ROWS * C)
    o_x = (slot * HEADS + i_l) * (2 * V * K)
    for i_back in tl.range(0, chunks, num_stages=STAGES):
        m_t = (last - i_back) * C + o_i < length
        m_vo = m_t[:, None] & m_v[None, :]
        b_k = load_slices(p_k + o_qk, m_t, o_k, K, NS, BS)  # [C, BS] each
        b_q = load_slices(p_q + o_qk, m_t, o_k, K, NS, BS)
        b_p = b_k
        if p_ptr is not None:
            b_p = load_slices(p_p + o_qk, m_t, o_k, K, NS, BS)
        b_do = tl.load(p_do + o_vo, mask=m_vo, other=0.0)  # [C, BV]
        b_t = tl.load(p_t + o_square)  # [C, C]
        b_a = tl.load(p_a + o_square)

        b_do = double_rows(tl.reshape(tl.trans(b_do).to(tl.float32), [NB, 1, 8, C]), NB, C)  # [2BV, C]
        b_dr = tl.zeros([2 * BV, C], dtype=tl.float32)
        for s in tl.static_range(NS):
            b_state = b_x[s].to(b_t.dtype)
            if dstates_ptr is not None:
                m_kept = m_rows[:, None] & (o_k + s * BS < K)[None, :]
                tl.store(dstates_ptr + o_x + o_kept + s * BS, b_state, mask=m_kept)
            b_dr = tl.dot(b_state, tl.trans(b_k[s]), acc=b_dr, input_precision=PRECISION)
        b_dr *= scale_rows(tl.load(p_c + WRITE_S * C + o_pair), NB, C)
        b_once = tl.where(is_n, 0.0, b_do).to(b_a.dtype)  # in the rows of S alone
        b_dr = tl.dot(b_once, b_a, acc=b_dr, input_precision=PRECISION)
        b_dr = double_rows(sum_pairs(b_dr, NB, C), NB, C).to(b_t.dtype)
        b_dw = tl.dot(b_dr, b_t, input_precision=PRECISION)
        b_dv = tl.trans(tl.reshape(sum_pairs(0.5 * b_dw, NB, C), [BV, C]))
        tl.store(p_dv + o_vo, b_dv.to(dv_ptr.dtype.element_ty), mask=m_vo)

        p_carry = p_c + CARRY * C
        b_do *= scale_rows(tl.load(p_c + OUT_S * C + o_pair), NB, C)
        b_do = b_do.to(b_t.dtype)
        b_dw *= scale_rows(tl.load(p_c + READ_S * C + o_pair), NB, C)
        b_dw = (-b_dw).to(b_t.dtype)
        b_next = ()
        for s in tl.static_range(NS):
            b_s, b_n = split_rows(b_x[s], NB, BS)
            b_n = tl.load(p_carry + 1) * b_s + tl.load(p_carry + 2) * b_n
            b_s = tl.load(p_carry) * b_s
            b_left = join_rows(b_s, b_n, NB, BS)
            b_left = tl.dot(b_do, b_q[s], acc=b_left, input_precision=PRECISION)
            b_next += (tl.dot(b_dw, b_p[s], acc=b_left, input_precision=PRECISION),)
        b_x = b_next

        p_q -= C * H * K
        p_k -= C * H * K
        p_p -= C * H * K
        p_do -= C * HV * V
        p_dv -= C * HV * V
        p_t -= HV * C * C
        p_a -= HV * C * C
        p_c -= HV * N_ROWS * C
        o_x -= HEADS * 2 * V * K

    if dinitial_state_ptr is not None:
        store_state(dinitial_state_ptr, b_x, i_n, i_hv, o_k, i_v, N, HV, K, V, NS, BS, BV)
