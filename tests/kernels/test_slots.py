"""Where chunks live in the per-chunk arrays, against a list of all of them."""

import random
from itertools import accumulate, pairwise

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE

from mdnbench.kernels.slots import count_slots, locate_chunk, sequence_bounds


@triton.jit
def locate_kernel(cu_seqlens_ptr, chunks_ptr, bounds_ptr, slots, T, N, NT, C: tl.constexpr, VARLEN: tl.constexpr):
    """chunks [slots, 4]: what locate_chunk says of a slot; bounds [N, 3]: what sequence_bounds says of a sequence."""
    i = tl.program_id(0)
    if i < slots:
        i_n, first, end, i_c = locate_chunk(cu_seqlens_ptr, i, T, N, NT, C, VARLEN)
        tl.store(chunks_ptr + i * 4, i_n)
        tl.store(chunks_ptr + i * 4 + 1, first)
        tl.store(chunks_ptr + i * 4 + 2, end)
        tl.store(chunks_ptr + i * 4 + 3, i_c)
    if i < N:
        first, end, slot = sequence_bounds(cu_seqlens_ptr, i, T, NT, C, VARLEN)
        tl.store(bounds_ptr + i * 3, first)
        tl.store(bounds_ptr + i * 3 + 1, end)
        tl.store(bounds_ptr + i * 3 + 2, slot)


def located(lengths, C, varlen, dtype=torch.int64):
    """What the kernels find for every slot, and for every sequence."""
    bounds = [0, *accumulate(lengths)]
    T = bounds[-1] if varlen else lengths[0]
    slots = count_slots(T, len(lengths), C, varlen)
    cu_seqlens = torch.tensor(bounds, dtype=dtype, device=DEVICE) if varlen else None
    chunks = torch.full((slots, 4), -1, device=DEVICE)
    sequences = torch.full((len(lengths), 3), -1, device=DEVICE)
    programs = max(slots, len(lengths))
    locate_kernel[(programs,)](cu_seqlens, chunks, sequences, slots, T, len(lengths), -(-T // C), C, varlen)
    return chunks.tolist(), sequences.tolist()


def check(lengths, C, varlen, dtype=torch.int64):
    chunks, sequences = located(lengths, C, varlen, dtype)
    taken = set()
    for n, (first, end) in enumerate(pairwise([0, *accumulate(lengths)])):
        assert sequences[n][:2] == [first, end]
        for i_c in range(-(-lengths[n] // C)):
            slot = sequences[n][2] + i_c
            assert slot not in taken
            assert chunks[slot] == [n, first, end, i_c]
            taken.add(slot)
    for slot in set(range(len(chunks))) - taken:  # empty: a chunk past the end of its sequence
        _, first, end, i_c = chunks[slot]
        assert first + i_c * C >= end
    assert varlen or len(taken) == len(chunks)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "lengths", [[1], [16], [17], [0, 0, 5, 0], [0, 16, 0, 16], [15, 1, 16, 17, 1], [1] * 20, [64, 0, 0, 0, 1]]
)
def test_packed(lengths, dtype):
    check(lengths, 16, True, dtype)


def test_packed_at_random():
    generator = random.Random(0)
    for C in (16, 32, 64, 128):
        for longest in (2, C, 3 * C):
            sizes = [1, C - 1, C, C + 1, *(generator.randrange(longest) for _ in range(10))]
            check([1, *generator.choices(sizes, k=generator.randrange(30))], C, True)


@pytest.mark.parametrize("T", [1, 16, 17, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_batch(T, batch):
    check([T] * batch, 16, False)
