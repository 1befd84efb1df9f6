"""Momentum DeltaNet (MDN) in PyTorch: the token recurrence that defines it, and a chunk form with its own gradients.

MDN: Huang et al., "MDN: Parallelizing Stepwise Momentum for Delta Linear Attention", arXiv 2605.05838. The chunk form
is not the paper's: README.md in this folder derives it, and its symbols (A, U, G, R, ...) are the names used here.

Both functions take the arguments of `mdnbench.kernels.chunk_momentum_delta_rule`, which documents and checks them;
nothing is checked here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import ChunkLayout

L2NORM_EPS = 1e-6


def differentiable_once(backward: Callable) -> Callable:
    """A backward pass that is an error where it would have to be differentiated in turn.

    PyTorch's `once_differentiable` finds out when the second derivative is taken, and not at all where the gradient
    that arrives is a constant, as that of a sum.
    """

    @functools.wraps(backward)
    def run(ctx, *grads):
        if torch.is_grad_enabled():  # the caller said create_graph=True
            raise RuntimeError("the MDN operators are differentiable once: call without create_graph=True")
        return backward(ctx, *grads)

    return run


def recurrent_mdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    log_mu: Tensor,
    p: Tensor | None = None,
    beta: Tensor | None = None,
    eta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    use_p_times_alpha: bool = True,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """MDN token by token: the definition. Plain PyTorch, so that autograd gives the true gradients to any order.

    w_t = p_t^T S_{t-1} - v_t;  M_t = mu_t M_{t-1} + eta_t k_t w_t;  S_t = alpha_t S_{t-1} - beta_t M_t;
    o_t = scale q_t^T S_t.

    Args:
        compute_dtype: dtype of the computation and of both results.

    Returns:
        o [B, T, HV, V] and the final state [2, N, HV, K, V] (None unless `output_final_state`), in `compute_dtype`.
    """
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        v, alpha, mu = v.to(compute_dtype), log_alpha.to(compute_dtype).exp(), log_mu.to(compute_dtype).exp()
        beta, eta = (torch.ones_like(alpha) if gate is None else gate.to(compute_dtype) for gate in (beta, eta))
        q, k, p = (None if x is None else x.to(compute_dtype) for x in (q, k, p))
        if use_qk_l2norm_in_kernel:
            q, k, p = (None if x is None else x * _inverse_norm(x) for x in (q, k, p))
        p = k if p is None else p
        groups = v.shape[2] // k.shape[2]
        q, k, p = (x.repeat_interleave(groups, dim=2) for x in (q, k, p))
        k = eta[..., None] * k
        p = alpha[..., None] * p if use_p_times_alpha else p
        alpha, mu, beta = (gate[..., None, None] for gate in (alpha, mu, beta))  # [B, T, HV, 1, 1]

        # One entry a run of tokens with its own state: the whole batch, or each packed sequence.
        bounds = [0, k.shape[1]] if cu_seqlens is None else _host_list(cu_seqlens)
        batch = k.shape[0]
        if initial_state is None:
            shape = (2, batch * (len(bounds) - 1), v.shape[2], k.shape[3], v.shape[3])
            initial_state = torch.zeros(shape, dtype=compute_dtype, device=v.device)
        starts = initial_state.to(compute_dtype).split(batch, dim=1)

        outputs, ends = [], []
        for begin, end, (S, M) in zip(bounds[:-1], bounds[1:], starts):
            tokens = [x[:, begin:end].unbind(1) for x in (q, k, p, v, alpha, mu, beta)]
            for q_t, k_t, p_t, v_t, alpha_t, mu_t, beta_t in zip(*tokens):
                w_t = (p_t[..., None, :] @ S).squeeze(-2) - v_t  # [B, HV, V]
                M = mu_t * M + k_t[..., :, None] * w_t[..., None, :]  # [B, HV, K, V]
                S = alpha_t * S - beta_t * M
                outputs.append(scale * (q_t[..., None, :] @ S).squeeze(-2))
            ends.append(torch.stack((S, M)))
        return torch.stack(outputs, dim=1), torch.cat(ends, dim=1) if output_final_state else None


def chunk_mdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    log_mu: Tensor,
    p: Tensor | None = None,
    beta: Tensor | None = None,
    eta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    use_p_times_alpha: bool = True,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """MDN in chunks of `chunk_size` tokens (any number of at least 1), differentiable once in every tensor.

    Computes in float64 for float64 inputs, else in float32. Only the step from one chunk to the next is a loop. For
    the backward pass it keeps its own inputs and R (the float32 prediction errors, as many numbers as v) and rebuilds
    everything else.

    Returns:
        o [B, T, HV, V] in q's dtype and the final state [2, N, HV, K, V] in the dtype of the computation (None unless
        `output_final_state`).
    """
    options = _Options(
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
        output_final_state=output_final_state,
        bounds=None if cu_seqlens is None else _host_list(cu_seqlens),
        l2norm=use_qk_l2norm_in_kernel,
        p_times_alpha=use_p_times_alpha,
        chunk_size=chunk_size,
    )
    return _ChunkMDN.apply(options, q, k, v, log_alpha, log_mu, p, beta, eta, initial_state)


class _Options(NamedTuple):
    """The arguments of `chunk_mdn` that are no tensors; `bounds` are cu_seqlens on the host."""

    scale: float
    output_final_state: bool
    bounds: list[int] | None
    l2norm: bool
    p_times_alpha: bool
    chunk_size: int


class _ChunkMDN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, *inputs):
        q, initial_state = inputs[0], inputs[-1]
        with torch.autocast(q.device.type, enabled=False):
            layout = ChunkLayout.of(q, options.chunk_size, options.bounds)
            x = _load(layout, options, *inputs[:-1])
            m = _chunk_matrices(x, options.scale)
            o, R, state = _forward(x, m, layout, _load_state(layout, x, initial_state))
            ctx.save_for_backward(*inputs, R)
            ctx.set_materialize_grads(False)
            ctx.options, ctx.layout = options, layout
            o = layout.unpack(o.flatten(1, 2), inputs[2]).to(q.dtype)
            return o, layout.unpack_state(state.flatten(1, 2)) if options.output_final_state else None

    @staticmethod
    @differentiable_once
    def backward(ctx, do, dfinal_state):
        *inputs, R = ctx.saved_tensors
        initial_state = inputs[-1]
        layout, options = ctx.layout, ctx.options
        with torch.autocast(R.device.type, enabled=False):
            x = _load(layout, options, *inputs[:-1])
            m = _chunk_matrices(x, options.scale)
            do = torch.zeros_like(x.v) if do is None else layout.pack(do, R.dtype).view_as(x.v)
            state, dstate = (_load_state(layout, x, s) for s in (initial_state, dfinal_state))
            g, dstate = _backward(x, m, layout, R, state, do, dstate)

            dq, dk, dp = g.q, g.k, g.p
            if x.p is x.k:
                dk, dp = dk + dp, None
            dlog_alpha = g.log_alpha + g.p_scale * x.alpha if options.p_times_alpha else g.log_alpha
            if options.l2norm:
                dq, dk = _l2norm_backward(x.q, x.q_norm, dq), _l2norm_backward(x.k, x.k_norm, dk)
                dp = None if dp is None else _l2norm_backward(x.p, x.p_norm, dp)
            grads = (dq, dk, g.v, dlog_alpha, g.log_mu, dp, g.beta, g.eta)
            grads = [
                layout.unpack(grad.flatten(1, 2), like).to(like.dtype) if like is not None else None
                for grad, like in zip(grads, inputs[:-1])
            ]
            dstate = layout.unpack_state(dstate.flatten(1, 2))
            return None, *grads, None if initial_state is None else dstate.to(initial_state.dtype)


class _Tokens(NamedTuple):
    """The tokens of all chunks. Batch dimensions [rows, H, HV // H], the third being 1 in q, k, p."""

    q: Tensor  # [..., C, K], normalised, as are k and p
    k: Tensor
    v: Tensor  # [..., C, V]
    p: Tensor  # without alpha
    alpha: Tensor  # [..., C]
    mu: Tensor
    beta: Tensor
    eta: Tensor
    p_scale: Tensor  # [..., C]: alpha or 1, so that the p of the recurrence is p_scale * p
    q_norm: Tensor | None  # [..., C, 1]: what q was multiplied by
    k_norm: Tensor | None
    p_norm: Tensor | None


def _load(layout: ChunkLayout, options: _Options, q, k, v, log_alpha, log_mu, p, beta, eta) -> _Tokens:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = (k.shape[2], v.shape[2] // k.shape[2])
    q, k, p = (None if x is None else layout.pack(x, dtype).unsqueeze(2) for x in (q, k, p))
    q_norm = k_norm = p_norm = None
    if options.l2norm:
        q_norm, k_norm, p_norm = (None if x is None else _inverse_norm(x) for x in (q, k, p))
        q, k, p = q * q_norm, k * k_norm, None if p is None else p * p_norm
    beta, eta = (torch.ones_like(log_alpha) if gate is None else gate for gate in (beta, eta))
    log_alpha, log_mu, beta, eta, v = (
        layout.pack(x, dtype).unflatten(1, groups) for x in (log_alpha, log_mu, beta, eta, v)
    )
    alpha, mu = log_alpha.exp(), log_mu.exp()
    p_scale = alpha if options.p_times_alpha else torch.ones_like(alpha)
    return _Tokens(q, k, v, k if p is None else p, alpha, mu, beta, eta, p_scale, q_norm, k_norm, p_norm)


def _load_state(layout: ChunkLayout, x: _Tokens, state: Tensor | None) -> Tensor:
    """(S, M) as [2, N, HV, K, V], zeros for None -> S above N = -M as [N, H, HV // H, 2 K, V]."""
    if state is None:
        return x.v.new_zeros(layout.sequences, *x.v.shape[1:3], 2 * x.k.shape[-1], x.v.shape[-1])
    return layout.pack_state(state, x.v.dtype).unflatten(1, x.v.shape[1:3])


class _ChunkMatrices(NamedTuple):
    """What a chunk does, whatever the state that enters it. Token 0 stands for that state in A, U and G."""

    scale: float
    A: Tensor  # [..., C + 1, C + 1]: A_ij = alpha_{j+1} ... alpha_i; 0 for i < j. U the same of mu
    U: Tensor
    G: Tensor  # [..., C + 1, C + 1]: how much of the error written at token j is in S_i
    qk: Tensor  # [..., C, C]: q_i . k_j
    pk: Tensor  # [..., C, C]: p_i . k_j
    o_weight: Tensor  # [..., C, C]: O takes (o_weight * qk) R
    r_weight: Tensor  # [..., C, C]: L = r_weight * pk, strictly lower triangular
    inverse: Tensor  # [..., C, C]: T = (I + L)^-1
    q_read: Tensor  # [..., C, 2]: weights of q_i^T S0 and q_i^T N0 in o_i
    p_read: Tensor  # [..., C, 2]: weights of p_i^T S0 and p_i^T N0 in the prediction of v_i
    write: Tensor  # [..., C, 2]: weights of k_j r_j^T in the S and the N that leave
    carry: Tensor  # [..., 2, 2]: (S0, N0) -> what is left of them in the (S, N) that leave


def _chunk_matrices(x: _Tokens, scale: float) -> _ChunkMatrices:
    A, U = _decay(x.alpha), _decay(x.mu)
    G = (A[..., 1:] * x.beta[..., None, :]) @ U[..., 1:, :]
    qk, pk = x.q @ x.k.mT, x.p @ x.k.mT
    r_weight = x.p_scale[..., :, None] * G[..., :-1, 1:] * x.eta[..., None, :]
    eye = torch.eye(qk.shape[-1], dtype=qk.dtype, device=qk.device)
    left = torch.stack((A[..., 0], G[..., 0]), dim=-1)  # [..., C + 1, 2]: what is left of S0, N0 in S_i
    left_in_n = torch.stack((torch.zeros_like(U[..., -1, 0]), U[..., -1, 0]), dim=-1)
    return _ChunkMatrices(
        scale=scale,
        A=A,
        U=U,
        G=G,
        qk=qk,
        pk=pk,
        o_weight=scale * G[..., 1:, 1:] * x.eta[..., None, :],
        r_weight=r_weight,
        inverse=torch.linalg.solve_triangular(r_weight * pk, eye, upper=False, unitriangular=True),
        q_read=scale * left[..., 1:, :],
        p_read=x.p_scale[..., None] * left[..., :-1, :],
        write=x.eta[..., None] * torch.stack((G[..., -1, 1:], U[..., -1, 1:]), dim=-1),
        carry=torch.stack((left[..., -1, :], left_in_n), dim=-2),
    )


def _forward(x: _Tokens, m: _ChunkMatrices, layout: ChunkLayout, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """o, the errors R [..., C, V] and the final state, in the place of `state`. README: "The chunk form"."""
    p_read, q_read, write = _pair(m.p_read, x.p), _pair(m.q_read, x.q), _pair(m.write, x.k)
    R, o = torch.empty_like(x.v), torch.empty_like(x.v)
    for rows in layout.steps:
        entering = state[: rows.stop - rows.start]
        R[rows] = m.inverse[rows] @ (x.v[rows] - p_read[rows] @ entering)
        o[rows] = q_read[rows] @ entering
        entering.copy_(_carry(m.carry[rows], entering) + write[rows].mT @ R[rows])
    return o.add_((m.o_weight * m.qk) @ R), R, state


class _TokenGrads(NamedTuple):
    """Gradients of `_Tokens`, and of the log gates instead of the gates."""

    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    log_alpha: Tensor
    log_mu: Tensor
    beta: Tensor
    eta: Tensor
    p_scale: Tensor


def _backward(
    x: _Tokens, m: _ChunkMatrices, layout: ChunkLayout, R: Tensor, state: Tensor, do: Tensor, dstate: Tensor
) -> tuple[_TokenGrads, Tensor]:
    """The gradients of the tokens and of the initial state; overwrites `state` and `dstate`. README: "Gradients"."""
    p_read, q_read, write = _pair(m.p_read, x.p), _pair(m.q_read, x.q), _pair(m.write, x.k)

    # The state that enters each chunk, rebuilt from R; then, in reverse, the gradient of the state that leaves it.
    entering = x.v.new_empty(x.v.shape[0], *state.shape[1:])  # [rows, H, HV // H, 2 K, V]
    leaving_grad = torch.empty_like(entering)
    for rows in layout.steps:
        current = state[: rows.stop - rows.start]
        entering[rows] = current
        current.copy_(_carry(m.carry[rows], current) + write[rows].mT @ R[rows])
    dv = (m.o_weight * m.qk).mT @ do  # the part of dR that comes from this chunk's outputs, until the loop is done
    for rows in reversed(layout.steps):
        current = dstate[: rows.stop - rows.start]
        leaving_grad[rows] = current
        dv[rows] = m.inverse[rows].mT @ (dv[rows] + write[rows] @ current)
        current.copy_(_carry(m.carry[rows].mT, current) + q_read[rows].mT @ do[rows] - p_read[rows].mT @ dv[rows])

    # Products of the outputs and errors with the states and with each other.
    dcarry = leaving_grad.unflatten(-2, (2, -1)).flatten(-2) @ entering.unflatten(-2, (2, -1)).flatten(-2).mT
    dq, dq_read = _pair_backward(m.q_read, x.q, do @ entering.mT)
    dp, dp_read = _pair_backward(m.p_read, x.p, -dv @ entering.mT)
    dk, dwrite = _pair_backward(m.write, x.k, R @ leaving_grad.mT)
    dattention, dL = do @ R.mT, -dv @ R.mT  # [..., C, C]; what lies above the diagonal meets zeros below
    dqk = (dattention * m.o_weight).sum(dim=2, keepdim=True)
    dpk = (dL * m.r_weight).sum(dim=2, keepdim=True)
    dq = dq + dqk @ x.k
    dp = dp + dpk @ x.k
    dk = dk + dqk.mT @ x.q + dpk.mT @ x.p

    # Gates: first the weights, then G = A diag(beta) U, then the products of decays.
    do_weight = m.scale * dattention * m.qk
    dr_weight = dL * m.pk
    eta_row, p_column = x.eta[..., None, :], x.p_scale[..., :, None]
    deta = (do_weight * m.G[..., 1:, 1:] + p_column * dr_weight * m.G[..., :-1, 1:]).sum(-2)
    deta = deta + dwrite[..., 0] * m.G[..., -1, 1:] + dwrite[..., 1] * m.U[..., -1, 1:]
    dp_scale = (eta_row * dr_weight * m.G[..., :-1, 1:]).sum(-1)
    dp_scale = dp_scale + dp_read[..., 0] * m.A[..., :-1, 0] + dp_read[..., 1] * m.G[..., :-1, 0]

    dG, dA, dU = torch.zeros_like(m.G), torch.zeros_like(m.A), torch.zeros_like(m.U)
    dG[..., 1:, 1:] += eta_row * do_weight
    dG[..., :-1, 1:] += p_column * eta_row * dr_weight
    dG[..., -1, 1:] += x.eta * dwrite[..., 0]
    dU[..., -1, 1:] += x.eta * dwrite[..., 1]
    for part, dread in ((dA, 0), (dG, 1)):
        part[..., 1:, 0] += m.scale * dq_read[..., dread]
        part[..., :-1, 0] += x.p_scale * dp_read[..., dread]
        part[..., -1, 0] += dcarry[..., 0, dread]
    dU[..., -1, 0] += dcarry[..., 1, 1]

    dbeta_U = m.A[..., 1:].mT @ dG  # [..., C, C + 1]: the gradient of diag(beta) U
    dbeta = (dbeta_U * m.U[..., 1:, :]).sum(-1)
    dU[..., 1:, :] += x.beta[..., :, None] * dbeta_U
    dA[..., 1:] += dG @ (x.beta[..., :, None] * m.U[..., 1:, :]).mT
    dlog_alpha, dlog_mu = _decay_backward(m.A, dA), _decay_backward(m.U, dU)
    return _TokenGrads(dq, dk, dv, dp, dlog_alpha, dlog_mu, dbeta, deta, dp_scale), dstate


def _decay(gate: Tensor) -> Tensor:
    """[..., C] -> D [..., C + 1, C + 1] with D_ij = gate_{j+1} ... gate_i for i >= j, else 0.

    A running product needs no logarithm, so that gate = 0 is nothing special and no difference loses digits.
    """
    C = gate.shape[-1]
    factors = gate.new_ones(*gate.shape[:-1], C + 1, C + 1)
    below = torch.ones(C, C + 1, dtype=torch.bool, device=gate.device).tril()
    factors[..., 1:, :] = torch.where(below, gate[..., :, None], 1.0)
    return factors.cumprod(dim=-2).tril()


def _decay_backward(D: Tensor, dD: Tensor) -> Tensor:
    """The gradient of the log gates: dlog_l = sum over i >= l > j of dD_ij D_ij, [..., C].

    Each sum holds only the terms that belong to it. (The reverse cumulative sum of row sums less column sums is the
    same number and cheaper, but cancels terms that do not.)
    """
    return (dD * D).cumsum(dim=-1)[..., :-1].tril(-1).sum(-2)


def _pair(weights: Tensor, x: Tensor) -> Tensor:
    """Weights [..., C, 2] and x [..., C, K] -> [..., C, 2 K]: both weighted copies side by side, as S is above N."""
    return (weights[..., :, None] * x[..., None, :]).flatten(-2)


def _pair_backward(weights: Tensor, x: Tensor, dpair: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (summed over the value heads that share it) and of the weights."""
    dpair = dpair.unflatten(-1, (2, -1))  # [..., C, 2, K]
    dx = (weights[..., :, None] * dpair).sum(dim=-2).sum(dim=2, keepdim=True)
    return dx, (dpair * x[..., None, :]).sum(dim=-1)


def _carry(carry: Tensor, state: Tensor) -> Tensor:
    """The 2 x 2 `carry` applied to (S, N) in the state [..., 2 K, V]."""
    return (carry @ state.unflatten(-2, (2, -1)).flatten(-2)).view_as(state)


def _inverse_norm(x: Tensor) -> Tensor:
    return (x.square().sum(dim=-1, keepdim=True) + L2NORM_EPS).rsqrt()


def _l2norm_backward(y: Tensor, inverse_norm: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x, where y = x * inverse_norm(x)."""
    return inverse_norm * (dy - y * (y * dy).sum(dim=-1, keepdim=True))


def _host_list(cu_seqlens: Tensor | Sequence[int]) -> list[int]:
    return cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
