"""Gated DeltaNet (Yang et al., arXiv 2412.06464): the delta rule with a scalar decay.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    o_t = K^-0.5 q_t^T S_t

with q and k L2-normalised. It is MDN with mu = 0 and beta = 1, whose eta is the beta here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .packages import FLA_INSTALL, import_from_fla
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


def _forward_flops(workload: Workload) -> int | None:
    """Products of one chunk of C tokens, in the notation of `chunk_gated_delta_rule`.

    For each query head Q K^T and K K^T; for each value head the reads K S0 and Q S0, the solve with V - diag(a) K S0 on
    the right, (A * Q K^T) R, and the write K^T R.
    """
    w, c = workload, workload.chunk_size
    if c is None:
        return None
    of_query_head = 2 * (2 * c * c * w.head_dim_k)
    of_value_head = 2 * (2 * c * c * w.head_dim_v) + 3 * (2 * c * w.head_dim_k * w.head_dim_v)
    return w.chunks * (w.heads * of_query_head + w.value_heads * of_value_head)


OPERATOR = Operator(
    name="gdn",
    title="Gated DeltaNet",
    gates=("log_alpha", "beta"),
    select=_select,
    truth=gated_delta_rule_truth,
    forward_flops=_forward_flops,
)


class GdnTorch(Provider):
    """The chunk form in PyTorch. Timed: the L2 norms of q and k, the decays from log_alpha, and the chunk form."""

    name = "gdn-torch"
    operator = OPERATOR
    chunk_sizes = (16, 32, 64, 128)

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        return lambda: chunk_gated_delta_rule(**inputs, chunk_size=workload.chunk_size)


FLA_ISSUE = "https://github.com/fla-org/flash-linear-attention/issues/640"


class GdnFla(Provider):
    """fla-core's Triton kernels, `chunk_gated_delta_rule`.

    Timed: the L2 norms of q and k (a kernel each), the cumulative sum of log_alpha, and the chunk form. beta and
    log_alpha are passed as they are. Its backward refuses Hopper with Triton 3.4 to 3.7.0, which miscompile it at some
    block sizes; the refusal is lifted, and the correctness check decides for each workload.
    """

    name = "gdn-fla"
    operator = OPERATOR
    package = "fla.ops.gated_delta_rule"
    install = FLA_INSTALL
    devices = ("cuda",)
    chunk_sizes = (16, 32, 64)

    def _supports(self, workload: Workload, mode: str) -> str | None:
        if workload.head_dim_k > 256:
            return f"takes head_dim_k up to 256 only, not {workload.head_dim_k}"
        return None

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        run = import_from_fla("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        if _fla_refuses():
            import_from_fla("fla.ops.common.chunk_o").TRITON_ABOVE_3_7_1 = True  # read by the refusal alone
        q, k, v, g, beta = (inputs[name] for name in ("q", "k", "v", "log_alpha", "beta"))
        return lambda: run(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, chunk_size=workload.chunk_size)[0]

    def notes(self, workload: Workload, mode: str) -> tuple[str, ...]:
        """See `Provider.notes`."""
        if mode == "forward" or not _fla_refuses():
            return ()
        return (f"fla refuses this backward pass on Hopper with Triton 3.4 to 3.7.0 ({FLA_ISSUE}); it was made to run",)


def _fla_refuses() -> bool:
    """Whether fla's backward would raise by itself; to be asked once it is imported."""
    utils = import_from_fla("fla.utils")
    return utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1


class GdnFlashQla(Provider):
    """FlashQLA's TileLang kernels, `chunk_gated_delta_rule`, which split one long sequence over the GPU by themselves.

    Timed: the L2 norms of q and k, the cumulative sum of log_alpha, and the chunk form, with chunks of 64.
    """

    name = "gdn-flashqla"
    operator = OPERATOR
    package = "flash_qla"
    install = "pip install flash-qla"
    devices = ("cuda",)
    dtypes = ("float16", "bfloat16")
    built_in_chunk_size = 64
    head_dims = ((128, 128),)

    def _supports(self, workload: Workload, mode: str) -> str | None:
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10):
            return f"is meant here for Hopper and data-centre Blackwell, not for {torch.cuda.get_device_name()}"
        return None

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        from flash_qla import chunk_gated_delta_rule as run

        q, k, v, g, beta = (inputs[name] for name in ("q", "k", "v", "log_alpha", "beta"))
        return lambda: run(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]
