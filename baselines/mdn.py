"""Momentum DeltaNet (Huang et al., arXiv 2605.05838): the operator of `mdnbench.kernels`.

    w_t = alpha_t k_t^T S_{t-1} - v_t
    M_t = mu_t M_{t-1} + eta_t k_t w_t
    S_t = alpha_t S_{t-1} - beta_t M_t
    o_t = K^-0.5 q_t^T S_t

with q and k L2-normalised.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mdnbench.kernels.reference import chunk_mdn, recurrent_mdn

from .provider import Inputs, Operator, Provider
from .recurrence import run_segments
from .workload import Workload

_NAMES = ("q", "k", "v", "log_alpha", "log_mu", "beta", "eta")


def _select(workload: Workload, inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in _NAMES}


def momentum_delta_rule_truth(workload: Workload, inputs: Inputs) -> Tensor:
    """Token by token. q, k [B, T, H, K], v [B, T, HV, V], gates [B, T, HV] to [B, T, HV, V]."""

    def run(state: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
        return recurrent_mdn(**dict(zip(_NAMES, tokens)), initial_state=state, output_final_state=True)

    w = workload
    start = inputs["v"].new_zeros(2, len(inputs["v"]), w.value_heads, w.head_dim_k, w.head_dim_v)
    return run_segments(run, start, [inputs[name] for name in _NAMES])[0]


OPERATOR = Operator(
    name="mdn",
    title="Momentum DeltaNet",
    gates=("log_alpha", "log_mu", "beta", "eta"),
    select=_select,
    truth=momentum_delta_rule_truth,
)


class MdnTorch(Provider):
    """The chunk form in PyTorch, with its own backward pass."""

    name = "mdn-torch"
    operator = OPERATOR
    chunk_sizes = (16, 32, 64, 128)

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        return lambda: chunk_mdn(**inputs, chunk_size=workload.chunk_size)[0]
