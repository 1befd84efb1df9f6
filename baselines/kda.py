"""Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay for each key channel.

    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,    alpha_t in [0, 1]^K
    o_t = K^-0.5 q_t^T S_t

with q and k L2-normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from .inputs import make_inputs
from .packages import FLA_INSTALL, import_from_fla
from .provider import Inputs, Operator, Provider
from .recurrence import (
    decay_from_start,
    decay_to_end,
    delta_rule_scan,
    group_heads,
    l2_normalise,
    merge_chunks,
    run_tokens,
    split_chunks,
)
from .workload import BYTES_PER_ELEMENT, Workload

LOGIT_EPS = 1e-7  # keeps the logits of gates that are 0 or 1 finite
CHANNEL_SPREAD = (0.5, 1.5)  # channels decay at these multiples of the profile's log_alpha, evenly spaced


def _select(workload: Workload, inputs: Inputs) -> Inputs:
    selected = {name: inputs[name] for name in ("q", "k", "v", "beta")}
    log_alpha = inputs["log_alpha"]
    rate = torch.linspace(*CHANNEL_SPREAD, workload.head_dim_k, device=log_alpha.device)
    return selected | {"log_alpha": log_alpha.unsqueeze(-1) * rate}


def kimi_delta_attention_truth(workload: Workload, inputs: Inputs) -> Tensor:
    """Token by token. q, k [B, T, H, K], v [B, T, HV, V], log_alpha [B, T, HV, K], beta [B, T, HV] to [B, T, HV, V]."""
    v = inputs["v"].unsqueeze(-2)  # [B, T, HV, 1, V]
    q, k = (group_heads(l2_normalise(inputs[x]), workload.value_heads).unsqueeze(-2) for x in "qk")
    q = q * workload.head_dim_k**-0.5
    alpha = inputs["log_alpha"].exp().unsqueeze(-1)  # [B, T, HV, K, 1]
    write = (inputs["beta"][..., None, None] * k).mT

    def step(state, q_t, k_t, v_t, write_t, alpha_t):
        state = alpha_t * state
        state = state + write_t @ (v_t - k_t @ state)
        return q_t @ state, state

    start = v.new_zeros(*v.shape[:1], workload.value_heads, workload.head_dim_k, workload.head_dim_v)
    return run_tokens(step, start, (q, k, v, write, alpha)).squeeze(-2)


def decayed_products(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Products of keys with the queries and keys after them, the key having decayed channel by channel.

    P[i, j] = sum_c q[i, c] exp(sum of log_decay[l, c] over j < l <= i) k[j, c] where i >= j, else 0;
    and the same with k in place of q.

    A chunk is halved until single tokens are left. Between the halves the decay splits at the middle into two factors
    of at most 1, so that no gate overflows, cancels or divides by zero.

    Args:
        q, k, log_decay: [..., C, K], C a power of two.

    Returns:
        Two tensors [..., C, C].
    """
    size = q.shape[-2]
    if size == 1:
        return (q * k).sum(-1, keepdim=True), (k * k).sum(-1, keepdim=True)
    q, k, log_decay = (x.unflatten(-2, (2, size // 2)) for x in (q, k, log_decay))
    (q_late, k_late, log_late) = (x[..., 1, :, :] for x in (q, k, log_decay))
    from_middle = decay_from_start(log_late, -2)
    to_middle = decay_to_end(log_decay[..., 0, :, :], -2)
    k_early = (k[..., 0, :, :] * to_middle).mT
    halves = decayed_products(q, k, log_decay)
    between = ((q_late * from_middle) @ k_early, (k_late * from_middle) @ k_early)
    return tuple(_lower_blocks(half, block) for half, block in zip(halves, between))


def _lower_blocks(diagonal: Tensor, below: Tensor) -> Tensor:
    """[[D0, 0], [X, D1]] from D [..., 2, n, n] and X [..., n, n]."""
    first, second = diagonal.unbind(-3)
    return torch.cat([torch.cat([first, torch.zeros_like(below)], -1), torch.cat([below, second], -1)], -2)


def chunk_kimi_delta_attention(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, chunk_size: int
) -> Tensor:
    """The chunk form, in float32. Shapes as in `kimi_delta_attention_truth`, the output in v's dtype.

    As `gdn.chunk_gated_delta_rule`, with the decay inside the products of q and k, where it no longer factors out.
    """
    batch, seq_len, value_heads, head_dim_v = v.shape
    q = l2_normalise(q.float()) * q.shape[-1] ** -0.5
    k = l2_normalise(k.float())
    q, k = (split_chunks(group_heads(x, value_heads), chunk_size) for x in (q, k))
    v_chunks, log_alpha, beta = (split_chunks(x, chunk_size) for x in (v, log_alpha, beta))

    qk, kk = (x * beta.unsqueeze(-2) for x in decayed_products(q, k, log_alpha))
    a = decay_from_start(log_alpha, -2)
    u, w = torch.linalg.solve_triangular(
        kk,
        torch.cat([v_chunks, a * k], -1),
        upper=False,
        unitriangular=True,  # takes the diagonal as 1
    ).split([head_dim_v, k.shape[-1]], -1)
    writes = beta.unsqueeze(-1) * decay_to_end(log_alpha, -2) * k
    state, error = delta_rule_scan(u, w, writes, a[..., -1, :, None])
    o = (a * q) @ state + qk @ error
    return merge_chunks(o, batch, seq_len, v.dtype)


def _forward_flops(workload: Workload) -> int | None:
    """As `gdn.OPERATOR`, but the decays of channels differ from one value head to the next, and with them the products
    of q and k."""
    w, c = workload, workload.chunk_size
    if c is None:
        return None
    products = 2 * (2 * c * c * w.head_dim_k) + 2 * (2 * c * c * w.head_dim_v)
    return w.chunks * w.value_heads * (products + 3 * (2 * c * w.head_dim_k * w.head_dim_v))


def _gate_bytes(workload: Workload) -> int:
    """log_alpha [B, T, HV, K] and beta [B, T, HV], in float32."""
    return workload.tokens * workload.value_heads * (workload.head_dim_k + 1) * BYTES_PER_ELEMENT["float32"]


OPERATOR = Operator(
    name="kda",
    title="Kimi Delta Attention",
    gates=("log_alpha", "beta"),
    select=_select,
    truth=kimi_delta_attention_truth,
    forward_flops=_forward_flops,
    gate_bytes=_gate_bytes,
)


class KdaTorch(Provider):
    """The chunk form in PyTorch. Timed: the L2 norms of q and k, the decays from log_alpha, and the chunk form."""

    name = "kda-torch"
    operator = OPERATOR
    chunk_sizes = (16, 32, 64, 128)

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        return lambda: chunk_kimi_delta_attention(**inputs, chunk_size=workload.chunk_size)


class KdaFla(Provider):
    """fla-core's Triton kernels, `chunk_kda`.

    Timed: the L2 norms of q and k (a kernel each), the cumulative sum of log_alpha, and the chunk form. log_alpha and
    beta are passed as they are: the kernels that also compute the gates of the layer are not used.
    """

    name = "kda-fla"
    operator = OPERATOR
    package = "fla.ops.kda"
    install = FLA_INSTALL
    devices = ("cuda",)
    chunk_sizes = (32, 64)

    def _supports(self, workload: Workload, mode: str) -> str | None:
        if workload.head_dim_k > 256:
            return f"takes head_dim_k up to 256 only, not {workload.head_dim_k}"
        return None

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        run = import_from_fla("fla.ops.kda").chunk_kda
        q, k, v, g, beta = (inputs[name] for name in ("q", "k", "v", "log_alpha", "beta"))
        return lambda: run(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, chunk_size=workload.chunk_size)[0]


class KdaFlashKda(Provider):
    """FlashKDA's CUTLASS kernels, forward only.

    They compute the gates of the layer themselves: log_alpha = -5 sigmoid(g + dt_bias) and beta = sigmoid(b), from g
    and b in bfloat16. The inverse of these is taken once, outside of the timing, with dt_bias the mean of a channel, so
    that little is lost in bfloat16. Timed: the allocation of the output, the gates, the L2 norms of q and k, and the
    chunk form, with chunks of 16.
    """

    name = "kda-flashkda"
    operator = OPERATOR
    package = "flash_kda"
    install = "pip install --no-build-isolation git+https://github.com/MoonshotAI/FlashKDA"
    devices = ("cuda",)
    dtypes = ("bfloat16",)
    built_in_chunk_size = 16
    head_dims = ((128, 128),)
    modes = ("forward",)
    least_log_alpha: ClassVar[float] = -5.0

    def _supports(self, workload: Workload, mode: str) -> str | None:
        if workload.value_heads != workload.heads:
            return f"needs as many value heads as query heads, not {workload.value_heads} for {workload.heads}"
        if _least_log_alpha(workload.gates) < self.least_log_alpha:
            return f"takes log_alpha from {self.least_log_alpha:g} to 0 only, and gates={workload.gates!r} has less"
        return None

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        import flash_kda

        q, k, v = (inputs[name].detach() for name in "qkv")
        share = inputs["log_alpha"].detach() / self.least_log_alpha
        if share.max() > 1:
            raise ValueError(f"log_alpha has values below {self.least_log_alpha:g}, which FlashKDA cannot express")
        g, b = (torch.logit(x, LOGIT_EPS) for x in (share, inputs["beta"].detach()))
        dt_bias = g.mean((0, 1))  # [H, K]
        g, b = (g - dt_bias).bfloat16(), b.bfloat16()
        a_log = g.new_zeros(workload.heads, dtype=torch.float32)
        scale = workload.head_dim_k**-0.5

        def run() -> Tensor:
            o = torch.empty_like(v)
            flash_kda.fwd(q, k, v, g, b, scale, o, A_log=a_log, dt_bias=dt_bias, lower_bound=self.least_log_alpha)
            return o

        return run


@cache
def _least_log_alpha(gates: str) -> float:
    """The strongest decay of a channel among some tokens of a gate profile."""
    few = Workload(seq_len=1024, head_dim_k=16, head_dim_v=1, heads=16, gates=gates)
    inputs, _ = make_inputs(OPERATOR, few, seed=0)
    return inputs["log_alpha"].min().item()
