"""Gated DeltaNet (Yang et al., arXiv 2412.06464): the delta rule with a scalar decay.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    o_t = K^-0.5 q_t^T S_t

with q and k L2-normalised. It is MDN with mu = 0 and beta = 1, whose eta is the beta here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .provider import Inputs, Operator, Provider
from .recurrence import (
    decay_from_start,
    decay_matrix,
    delta_rule_scan,
    group_heads,
    l2_normalise,
    merge_chunks,
    run_tokens,
    split_chunks,
)
from .workload import Workload


def _select(workload: Workload, inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in ("q", "k", "v", "log_alpha", "beta")}


def gated_delta_rule_truth(workload: Workload, inputs: Inputs) -> Tensor:
    """Token by token. q, k [B, T, H, K], v [B, T, HV, V], log_alpha, beta [B, T, HV] to [B, T, HV, V]."""
    v = inputs["v"].unsqueeze(-2)  # [B, T, HV, 1, V]
    q, k = (group_heads(l2_normalise(inputs[x]), workload.value_heads).unsqueeze(-2) for x in "qk")
    q = q * workload.head_dim_k**-0.5
    alpha = inputs["log_alpha"].exp()[..., None, None]
    write = (inputs["beta"][..., None, None] * k).mT

    def step(state, q_t, p_t, v_t, write_t, alpha_t):
        state = alpha_t * state + write_t @ (v_t - p_t @ state)
        return q_t @ state, state

    start = v.new_zeros(*v.shape[:1], workload.value_heads, workload.head_dim_k, workload.head_dim_v)
    return run_tokens(step, start, (q, alpha * k, v, write, alpha)).squeeze(-2)


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, chunk_size: int) -> Tensor:
    """The chunk form, in float32. Shapes as in `gated_delta_rule_truth`, the output in v's dtype.

    With A the decay matrix and a the decay from the start of the chunk, R_i = v_i - alpha_i k_i^T S_{i-1} solves
    (I + strict_tril(A * K K^T) diag(beta)) R = V - diag(a) K S0, and O = diag(a) Q S0 + (A * Q K^T) diag(beta) R.
    """
    batch, seq_len, value_heads, head_dim_v = v.shape
    q = l2_normalise(q.float()) * q.shape[-1] ** -0.5
    k = l2_normalise(k.float())
    q, k = (split_chunks(group_heads(x, value_heads), chunk_size) for x in (q, k))
    v_chunks, log_alpha, beta = (split_chunks(x, chunk_size) for x in (v, log_alpha, beta))

    decay = decay_matrix(log_alpha)  # [N, BH, C, C]
    a = decay_from_start(log_alpha, -1).unsqueeze(-1)
    write = beta.unsqueeze(-1) * k
    system = decay * (k @ write.mT)  # the solver takes the diagonal as 1
    u, w = torch.linalg.solve_triangular(
        system, torch.cat([v_chunks, a * k], -1), upper=False, unitriangular=True
    ).split([head_dim_v, k.shape[-1]], -1)
    state, error = delta_rule_scan(u, w, decay[..., -1, :, None] * write, a[..., -1:, :])
    o = (a * q) @ state + (decay * (q @ write.mT)) @ error
    return merge_chunks(o, batch, seq_len, v.dtype)


OPERATOR = Operator(
    name="gdn",
    title="Gated DeltaNet",
    gates=("log_alpha", "beta"),
    select=_select,
    truth=gated_delta_rule_truth,
)


class GdnTorch(Provider):
    """The chunk form in PyTorch."""

    name = "gdn-torch"
    operator = OPERATOR
    chunk_sizes = (16, 32, 64, 128)

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        return lambda: chunk_gated_delta_rule(**inputs, chunk_size=workload.chunk_size)
