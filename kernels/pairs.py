"""The tile that carries a state through the chunks: S and N of BV value columns, transposed, as X [2 BV, K] in float32.

Rows alternate between S and N in groups of eight. In the accumulator layout of the tensor cores a thread then holds
row r of S and row r of N, so that the two mix in registers, and X is a left operand from registers too. What has one
row a value column, as W and R, is doubled to fill the tensor core's tile.

The scans hold X in slices of up to SLICE columns of K, a tuple of [2 BV, BS]. As a left operand a slice is a copy in
registers, in 16 bits; one of all K = 256 columns would not fit beside X itself.
"""

import triton
import triton.language as tl

SLICE = tl.constexpr(64)


@triton.jit
def sum_pairs(b_x, NB: tl.constexpr, N: tl.constexpr):
    """S row + N row of a tile [16 NB, N]: [NB, 1, 8, N]."""
    return tl.sum(tl.reshape(b_x, [NB, 2, 8, N]), axis=1, keep_dims=True)


@triton.jit
def double_rows(b_x, NB: tl.constexpr, N: tl.constexpr):
    """Each row of [NB, 1, 8, N] as S row and as N row: [16 NB, N]."""
    return tl.reshape(tl.broadcast_to(b_x, [NB, 2, 8, N]), [16 * NB, N])


@triton.jit
def scale_rows(b_c, NB: tl.constexpr, C: tl.constexpr):
    """Coefficients [2, C] of S and of N, for every row of X: [16 NB, C]."""
    return tl.reshape(tl.broadcast_to(tl.reshape(b_c, [1, 2, 1, C]), [NB, 2, 8, C]), [16 * NB, C])


@triton.jit
def split_rows(b_x, NB: tl.constexpr, N: tl.constexpr):
    """S and N of X [16 NB, N]: [NB, 8, N] each."""
    return tl.split(tl.permute(tl.reshape(b_x, [NB, 2, 8, N]), (0, 2, 3, 1)))


@triton.jit
def join_rows(b_s, b_n, NB: tl.constexpr, N: tl.constexpr):
    """The inverse of split_rows."""
    return tl.reshape(tl.permute(tl.join(b_s, b_n), (0, 3, 1, 2)), [16 * NB, N])


@triton.jit
def leave_chunk(b_x, p_carry, NB: tl.constexpr, N: tl.constexpr):
    """X [16 NB, N] as far as it is left at the chunk's end: a_C S + b_C N and u_C N, with a_C, b_C, u_C at p_carry."""
    b_s, b_n = split_rows(b_x, NB, N)
    b_s = tl.load(p_carry) * b_s + tl.load(p_carry + 1) * b_n
    b_n = tl.load(p_carry + 2) * b_n
    return join_rows(b_s, b_n, NB, N)


@triton.jit
def value_columns(i_v, BV: tl.constexpr):
    """The value column of every row of X."""
    o_r = tl.arange(0, 2 * BV)
    return i_v * BV + (o_r // 16 * 8 + o_r % 8)


@triton.jit
def rows_of_n(BV: tl.constexpr):
    """Whether a row of X is of N, [2 BV, 1]."""
    return (tl.arange(0, 2 * BV) // 8 % 2 == 1)[:, None]


@triton.jit
def state_tile(i_n, i_hv, o_k, i_v, N, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Offsets (int64) of X's elements in a state [2, N, HV, K, V], their mask, and which rows are of N."""
    is_n = rows_of_n(BV)
    o_rv = value_columns(i_v, BV)
    o_state = ((i_n.to(tl.int64) * HV + i_hv) * K + o_k)[None, :] * V + o_rv[:, None]
    o_state += tl.where(is_n, N.to(tl.int64) * (HV * K * V), 0)
    return o_state, (o_k < K)[None, :] & (o_rv < V)[:, None], is_n


@triton.jit
def load_state(
    p_state, i_n, i_hv, o_k, i_v, N,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NS: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """X in NS slices of BS columns of K, from a state [2, N, HV, K, V] of S, then M = -N; zeros without p_state."""
    b_x = ()
    for s in tl.static_range(NS):
        if p_state is not None:
            o_state, m_state, is_n = state_tile(i_n, i_hv, o_k + s * BS, i_v, N, HV, K, V, BV)
            b_state = tl.load(p_state + o_state, mask=m_state, other=0.0).to(tl.float32)
            b_x += (tl.where(is_n, -b_state, b_state),)
        else:
            b_x += (tl.zeros([2 * BV, BS], dtype=tl.float32),)
    return b_x


@triton.jit
def store_state(
    p_state, b_x, i_n, i_hv, o_k, i_v, N,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NS: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The inverse of load_state."""
    for s in tl.static_range(NS):
        o_state, m_state, is_n = state_tile(i_n, i_hv, o_k + s * BS, i_v, N, HV, K, V, BV)
        tl.store(p_state + o_state, tl.where(is_n, -b_x[s], b_x[s]), mask=m_state)


@triton.jit
def load_slices(p_x, m_t, o_k, K: tl.constexpr, NS: tl.constexpr, BS: tl.constexpr):
    """Rows of K elements at p_x [C, BS], where m_t, in NS slices of BS columns."""
    slices = ()
    for s in tl.static_range(NS):
        mask = m_t[:, None] & (o_k + s * BS < K)[None, :]
        slices += (tl.load(p_x + s * BS, mask=mask, other=0.0),)
    return slices


@triton.jit
def chunk_state_tile(o_k, i_v, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Offsets of X's elements in the states of one chunk [2, V, K], S then N."""
    o_r = tl.arange(0, 2 * BV)
    return ((o_r // 8 % 2) * V + value_columns(i_v, BV))[:, None] * K + o_k[None, :]
