"""Tokens of a batch, or of packed sequences, laid out in chunks for the PyTorch chunk form."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Where tokens and states lie while chunks are computed: tensors of [rows, heads, C, ...], one row a chunk.

    Rows are ordered by the chunk's place in its sequence, and within one place by sequence, longest first. So step c
    of the loop over chunks is a slice of rows, and works on the first so many states. The last chunk of a sequence is
    filled up with tokens that change nothing: alpha = mu = 1, beta = 0, k = 0.
    """

    chunk_size: int
    row: Tensor  # [tokens] int64: the row of each token
    slot: Tensor  # [tokens] int64: its place in the chunk
    steps: list[slice]  # the rows of each step
    order: Tensor | None  # [N] int64: the sequences, longest first; None where they are all as long
    sequences: int

    @classmethod
    def of(cls, q: Tensor, chunk_size: int, bounds: list[int] | None) -> ChunkLayout:
        """For q [B, T, ...]: B sequences of T tokens, or (B = 1) those between `bounds`.

        A chunk is no longer than the longest sequence, so that one token does not cost a whole chunk.
        """
        batch, seq_len, device = q.shape[0], q.shape[1], q.device
        if bounds is None:
            C = min(chunk_size, seq_len)
            position = torch.arange(seq_len, device=device).repeat(batch)
            sequence = torch.arange(batch, device=device).repeat_interleave(seq_len)
            steps = [slice(c * batch, (c + 1) * batch) for c in range(-(-seq_len // C))]
            return cls(C, position // C * batch + sequence, position % C, steps, None, batch)
        lengths = [end - begin for begin, end in pairwise(bounds)]
        C = min(chunk_size, max(lengths))
        order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        steps, first = [], 0
        for c in range(-(-max(lengths) // C)):
            active = sum(length > c * C for length in lengths)
            steps.append(slice(first, first + active))
            first += active
        # Tokens in the order of the input: of sequence 0, of sequence 1, ...
        rank = torch.tensor(order, device=device).argsort()
        repeats = torch.tensor(lengths, device=device)
        begins = torch.tensor(bounds[:-1], device=device).repeat_interleave(repeats, output_size=seq_len)
        position = torch.arange(seq_len, device=device) - begins
        first_rows = torch.tensor([rows.start for rows in steps], device=device)
        row = first_rows[position // C] + rank.repeat_interleave(repeats, output_size=seq_len)
        return cls(C, row, position % C, steps, torch.tensor(order, device=device), len(lengths))

    def pack(self, x: Tensor, dtype: torch.dtype, filler: float = 0.0) -> Tensor:
        """[B, T, heads, ...] -> [rows, heads, C, ...] in `dtype`."""
        shape = (self.steps[-1].stop, x.shape[2], self.chunk_size, *x.shape[3:])
        out = x.new_full(shape, filler, dtype=dtype)
        out.flatten(0, 2).index_copy_(0, self._index(x.shape[2]), x.flatten(0, 2).to(dtype))
        return out

    def unpack(self, x: Tensor, like: Tensor) -> Tensor:
        """[rows, heads, C, ...] -> [B, T, heads, ...], the shape of `like`."""
        return x.flatten(0, 2).index_select(0, self._index(x.shape[1])).view(like.shape)

    def pack_state(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """(S, M) [2, N, HV, K, V] -> S above N = -M [N, HV, 2 K, V] in `dtype`, sequences in the order of the rows."""
        state = torch.cat((state[0], -state[1]), dim=-2).to(dtype)
        return state if self.order is None else state.index_select(0, self.order)

    def unpack_state(self, state: Tensor) -> Tensor:
        """The inverse of `pack_state`. Each is also the gradient of the other."""
        if self.order is not None:
            state = torch.empty_like(state).index_copy_(0, self.order, state)
        S, N = state.chunk(2, dim=-2)
        return torch.stack((S, -N))

    def _index(self, heads: int) -> Tensor:
        head = torch.arange(heads, device=self.row.device)
        return ((self.row[:, None] * heads + head) * self.chunk_size + self.slot[:, None]).flatten()
