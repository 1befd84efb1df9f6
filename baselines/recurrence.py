"""What the recurrent operators share: the token loop of their truths and the chunk bookkeeping of their PyTorch forms.

The PyTorch forms hold chunked tensors as [N, B*H, C, ...]: chunks first, so that the loop over chunks reads contiguous
slices and every other step is one batched operation over all chunks, sequences and heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

L2_NORM_EPS = 1e-6
TOKENS_PER_SEGMENT = 64


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) along the last axis."""
    return x * (x.square().sum(-1, keepdim=True) + L2_NORM_EPS).rsqrt()


def group_heads(x: Tensor, value_heads: int) -> Tensor:
    """Repeats query or key heads [B, T, H, ...] so that value head h reads head h // (HV // H): [B, T, HV, ...]."""
    groups = value_heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def run_segments(
    run: Callable[..., tuple[Tensor, Tensor]], state: Tensor, tokens: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """A token recurrence over a long sequence, differentiable, at bounded memory.

    Backward would keep several states a token; recomputing a segment of tokens keeps one state for each segment.

    Args:
        run: (state, *tokens of a segment) -> (outputs [B, T', ...], state after them).
        state: the state before the first token.
        tokens: tensors [B, T, ...], of which `run` gets slices of up to 64 tokens.

    Returns:
        The outputs [B, T, ...] and the final state.
    """
    if tokens[0].shape[1] <= TOKENS_PER_SEGMENT:
        return run(state, *tokens)
    outputs = []
    for segment in zip(*(x.split(TOKENS_PER_SEGMENT, dim=1) for x in tokens)):
        output, state = checkpoint(run, state, *segment, use_reentrant=False, preserve_rng_state=False)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def run_tokens(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, tokens: Sequence[Tensor]) -> Tensor:
    """`run_segments` token by token: `step` maps (state, *token) to (output, next state); returns the outputs."""

    def run(state: Tensor, *segment: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for token in zip(*(x.unbind(1) for x in segment)):
            output, state = step(state, *token)
            outputs.append(output)
        return torch.stack(outputs, dim=1), state

    return run_segments(run, state, tokens)[0]


def split_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """[B, T, H, ...] in any dtype to [N, B*H, C, ...] in float32, the last chunk padded with zeros."""
    batch, seq_len, heads, *rest = x.shape
    missing = -seq_len % chunk_size
    x = F.pad(x.float(), [0, 0] * (x.ndim - 2) + [0, missing])
    x = x.unflatten(1, (-1, chunk_size))  # [B, N, C, H, ...]
    return x.movedim((1, 3), (0, 2)).reshape(-1, batch * heads, chunk_size, *rest)


def merge_chunks(x: Tensor, batch: int, seq_len: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `split_chunks`: [N, B*H, C, V] to [B, T, H, V] in `dtype`, padding dropped."""
    x = x.unflatten(1, (batch, -1)).movedim((0, 2), (1, 3))  # [B, N, C, H, V]
    return x.flatten(1, 2)[:, :seq_len].to(dtype)


def decay_matrix(log_decay: Tensor) -> Tensor:
    """D[i, j] = product of exp(log_decay[l]) over j < l <= i where i >= j, else 0: [..., C] to [..., C, C].

    Each entry sums its own gates: a difference of two running sums would lose digits after strong decays, and be NaN
    after log_decay = -inf.
    """
    size = log_decay.shape[-1]
    row = torch.arange(size, device=log_decay.device)
    is_later = row[None, :] > row[:, None]  # [j, l]
    sums = torch.where(is_later, log_decay.unsqueeze(-2), 0.0).cumsum(-1)  # [j, i]
    return sums.exp().transpose(-1, -2).tril()


def decay_from_start(log_decay: Tensor, dim: int) -> Tensor:
    """exp of the sum over l <= i, along `dim`."""
    return log_decay.cumsum(dim).exp()


def decay_to_end(log_decay: Tensor, dim: int) -> Tensor:
    """exp of the sum over l > i, along `dim`; summed from the end, for the reason `decay_matrix` gives."""
    later = log_decay.narrow(dim, 1, log_decay.shape[dim] - 1)
    later = torch.cat([later, torch.zeros_like(log_decay.narrow(dim, 0, 1))], dim)
    return later.flip(dim).cumsum(dim).flip(dim).exp()


def delta_rule_scan(u: Tensor, w: Tensor, writes: Tensor, chunk_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The one sequential step of the delta rules: from the state entering each chunk to the next.

    R = U - W S,  S <- diag(chunk_decay) S + writes^T R,  from S = 0.

    Args:
        u: [N, B*H, C, V].
        w, writes: [N, B*H, C, K].
        chunk_decay: [N, B*H, K, 1] or [N, B*H, 1, 1].

    Returns:
        S entering each chunk [N, B*H, K, V], and R [N, B*H, C, V].
    """
    state = u.new_zeros(u.shape[1], w.shape[-1], u.shape[-1])
    states, errors = [], []
    for u_n, w_n, writes_n, decay_n in zip(u, w, writes.transpose(-1, -2), chunk_decay):
        states.append(state)
        errors.append(torch.baddbmm(u_n, w_n, state, alpha=-1))
        state = torch.baddbmm(decay_n * state, writes_n, errors[-1])
    return torch.stack(states), torch.stack(errors)
