"""Where a chunk lives: every chunk of every sequence has a slot of its own in the per-chunk arrays.

A batch of B sequences of T tokens has NT = ceil(T / C) chunks a sequence, and chunk c of sequence n has slot n NT + c.
Packed sequences (`cu_seqlens`) start at slot cu_seqlens[n] // C + n: sequence n takes ceil(len_n / C) slots, and never
more than there are up to the start of the next. So slots need no prefix sum over the lengths and no value on the host;
a few stay empty.
"""

import triton
import triton.language as tl


def count_slots(tokens: int, sequences: int, chunk_size: int, varlen: bool) -> int:
    """Slots to allocate for `sequences` sequences of `tokens` tokens each, or together when packed."""
    return tokens // chunk_size + sequences if varlen else sequences * -(-tokens // chunk_size)


@triton.jit
def sequence_bounds(cu_seqlens_ptr, i_n, T, NT, C: tl.constexpr, VARLEN: tl.constexpr):
    """First token, end token (int64) and first slot of sequence i_n."""
    if VARLEN:
        first = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + i_n + 1).to(tl.int64)
        slot = first // C + i_n
    else:
        first = i_n.to(tl.int64) * T
        end = first + T
        slot = i_n.to(tl.int64) * NT
    return first, end, slot


@triton.jit
def locate_chunk(cu_seqlens_ptr, slot, T, N, NT, C: tl.constexpr, VARLEN: tl.constexpr):
    """Sequence, its first and end token (int64), and the chunk's number in it; empty slots are chunks past the end."""
    if VARLEN:
        i_n = 0
        last = N - 1
        while i_n < last:  # the last sequence that starts at or before this slot
            middle = (i_n + last + 1) // 2
            here = tl.load(cu_seqlens_ptr + middle) // C + middle <= slot
            i_n = tl.where(here, middle, i_n)
            last = tl.where(here, last, middle - 1)
    else:
        i_n = slot // NT
    first, end, first_slot = sequence_bounds(cu_seqlens_ptr, i_n, T, NT, C, VARLEN)
    return i_n, first, end, slot - first_slot
