"""Mamba-2's state-space duality (Dao and Gu, arXiv 2405.21060): linear attention with a scalar decay.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T
    y_t = C_t^T h_t

B and C are the keys and queries (a group of value heads shares one pair), x the values; no D, z or bias term.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .packages import import_beside
from .provider import Inputs, Operator, Provider
from .recurrence import decay_from_start, decay_matrix, group_heads, merge_chunks, run_tokens, split_chunks
from .workload import Workload


def _select(workload: Workload, inputs: Inputs) -> Inputs:
    """A = -1 and dt = -log_alpha, so that the decay is the profile's; C carries the scale K^-0.5."""
    dt = -inputs["log_alpha"]
    if dt.isinf().any():
        raise ValueError("Mamba-2 writes with the same step that decays, so an infinite decay has no finite write")
    if not dt.any():
        raise ValueError("Mamba-2 writes with the same step that decays, so without any decay it writes nothing")
    return {
        "x": inputs["v"],
        "dt": dt,
        "A": -dt.new_ones(workload.value_heads),
        "B": inputs["k"],
        "C": inputs["q"] * workload.head_dim_k**-0.5,
    }


def state_space_truth(workload: Workload, inputs: Inputs) -> Tensor:
    """Token by token. x [B, T, HV, V], dt [B, T, HV], A [HV], B, C [B, T, H, K] to [B, T, HV, V]."""
    x, dt = inputs["x"].unsqueeze(-2), inputs["dt"][..., None, None]
    b, c = (group_heads(inputs[name], workload.value_heads).unsqueeze(-2) for name in "BC")
    decay = (dt * inputs["A"][:, None, None]).exp()
    write = (dt * b).mT

    def step(state, x_t, c_t, write_t, decay_t):
        state = decay_t * state + write_t * x_t
        return c_t @ state, state

    start = x.new_zeros(*x.shape[:1], workload.value_heads, workload.head_dim_k, workload.head_dim_v)
    return run_tokens(step, start, (x, c, write, decay)).squeeze(-2)


def chunk_state_space(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """The chunk form, in float32. Shapes as in `state_space_truth`, the output in x's dtype.

    With L the decay matrix and l the decay from the start of the chunk, Y = diag(l) C h0 + (L * C B^T) diag(dt) X.
    """
    batch, seq_len, value_heads, _ = x.shape
    log_decay = split_chunks(dt * A, chunk_size)
    steps = split_chunks(dt.unsqueeze(-1) * x.float(), chunk_size)
    b, c = (split_chunks(group_heads(tensor, value_heads), chunk_size) for tensor in (B, C))

    decay = decay_matrix(log_decay)  # [N, BH, C, C]
    from_start = decay_from_start(log_decay, -1).unsqueeze(-1)
    writes = (decay[..., -1, :, None] * b).mT @ steps
    state = torch.zeros_like(writes[0])
    states = []
    for write, chunk_decay in zip(writes, from_start[..., -1:, :]):
        states.append(state)
        state = torch.addcmul(write, chunk_decay, state)
    y = (from_start * c) @ torch.stack(states) + (decay * (c @ b.mT)) @ steps
    return merge_chunks(y, batch, seq_len, x.dtype)


def _forward_flops(workload: Workload) -> int | None:
    """Products of one chunk of C tokens, in the notation of `chunk_state_space`.

    For each query head C B^T; for each value head the read C h0, the write B^T X and (L * C B^T) X.
    """
    w, c = workload, workload.chunk_size
    if c is None:
        return None
    of_value_head = 2 * c * c * w.head_dim_v + 2 * (2 * c * w.head_dim_k * w.head_dim_v)
    return w.chunks * (w.heads * 2 * c * c * w.head_dim_k + w.value_heads * of_value_head)


OPERATOR = Operator(
    name="mamba2",
    title="Mamba-2",
    gates=("log_alpha",),
    select=_select,
    truth=state_space_truth,
    forward_flops=_forward_flops,
)


class Mamba2Torch(Provider):
    """The chunk form in PyTorch. Timed: the decays from dt A, and the chunk form."""

    name = "mamba2-torch"
    operator = OPERATOR
    chunk_sizes = (16, 32, 64, 128, 256)

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        return lambda: chunk_state_space(**inputs, chunk_size=workload.chunk_size)


class Mamba2Ssd(Provider):
    """mamba-ssm's Triton kernels, `mamba_chunk_scan_combined`.

    The state size is head_dim_k, the head dimension head_dim_v, and each query head is a group of B and C: heads = 1
    with many value heads is the model's own setting, heads = value_heads the one that equals the other operators' work.
    Timed: the cumulative sum of dt A and the chunk form. dt is passed as it is, without bias and softplus; the scale of
    the queries is in C, outside of the timing; there is no L2 norm.
    """

    name = "mamba2-ssd"
    operator = OPERATOR
    package = "mamba_ssm"
    install = "MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm==2.3.2.post1 einops"
    devices = ("cuda",)
    chunk_sizes = (64, 128, 256)

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        # The top level imports Mamba-1's CUDA extension, which a build without CUDA lacks.
        ssd = import_beside("mamba_ssm.ops.triton.ssd_combined", "mamba_ssm")
        x, dt, a, b, c = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
        return lambda: ssd.mamba_chunk_scan_combined(x, dt, a, b, c, workload.chunk_size)
