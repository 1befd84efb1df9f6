"""Backward: the states that enter every chunk, rebuilt from the errors R that the forward kept.

    S' = a_C S + b_C N + K^T (write_s * R)              N' = u_C N + K^T (write_n * R)

Given R the recurrence has numbers for coefficients: no chain of products from chunk to chunk, one product a step.
"""

import triton
import triton.language as tl

from .gates import CARRY, N_ROWS, WRITE_S
from .pairs import chunk_state_tile, double_rows, leave_chunk, scale_rows, state_tile
from .slots import sequence_bounds


@triton.jit(do_not_specialize=["T", "N", "NT", "first_head"])
def states_bwd_kernel(
    k_ptr, r_ptr, coefficients_ptr, initial_state_ptr, states_ptr, cu_seqlens_ptr,
    T, N, NT, first_head,
    H: tl.constexpr, HV: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a tile BK x BV of the states of one of HEADS value heads from first_head, through one sequence.

    k: [tokens, H, K]; r: [tokens, HV, V]; states: [slots, HEADS, 2, V, K] (S, then N) in k's dtype, written.
    """
    NB: tl.constexpr = BV // 8
    NV: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = (K + BK - 1) // BK * NV
    i_k = tl.program_id(0) % TILES // NV
    i_v = tl.program_id(0) % NV
    i_n = tl.program_id(0) // (TILES * HEADS)
    i_l = tl.program_id(0) // TILES % HEADS
    i_hv = first_head + i_l
    i_h = i_hv // (HV // H)
    first, end, slot = sequence_bounds(cu_seqlens_ptr, i_n, T, NT, C, VARLEN)
    length = (end - first).to(tl.int32)

    o_i = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    o_state, m_state, is_n = state_tile(i_n, i_hv, o_k, i_v, N, HV, K, V, BV)
    if initial_state_ptr is not None:
        b_x = tl.load(initial_state_ptr + o_state, mask=m_state, other=0.0).to(tl.float32)
        b_x = tl.where(is_n, -b_x, b_x)
    else:
        b_x = tl.zeros([2 * BV, BK], dtype=tl.float32)

    o_qk = o_i[:, None] * (H * K) + o_k[None, :]
    o_vo = o_i[:, None] * (HV * V) + o_v[None, :]
    o_pair = tl.arange(0, 2)[:, None] * C + o_i[None, :]
    o_kept = chunk_state_tile(o_k, i_v, K, V, BV)
    p_k = k_ptr + (first * H + i_h) * K
    p_r = r_ptr + (first * HV + i_hv) * V
    p_c = coefficients_ptr + (slot * HV + i_hv) * (N_ROWS * C)
    p_x = states_ptr + (slot * HEADS + i_l) * (2 * V * K)
    for i_c in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        m_t = i_c * C + o_i < length
        b_k = tl.load(p_k + o_qk, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [C, BK]
        b_r = tl.load(p_r + o_vo, mask=m_t[:, None] & m_v[None, :], other=0.0)  # [C, BV]
        tl.store(p_x + o_kept, b_x.to(states_ptr.dtype.element_ty), mask=m_state)
        b_r = double_rows(tl.reshape(tl.trans(b_r).to(tl.float32), [NB, 1, 8, C]), NB, C)
        b_r *= scale_rows(tl.load(p_c + WRITE_S * C + o_pair), NB, C)
        b_x = leave_chunk(b_x, p_c + CARRY * C, NB, BK)
        b_x = tl.dot(b_r.to(b_k.dtype), b_k, acc=b_x, input_precision=PRECISION)
        p_k += C * H * K
        p_r += C * HV * V
        p_c += HV * N_ROWS * C
        p_x += HEADS * 2 * V * K
