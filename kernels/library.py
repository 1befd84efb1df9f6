"""What PyTorch is told of the Triton operators, so that torch.compile keeps a call whole and autograd goes through it.

`register` is for an operator that runs its Triton kernels forward and recomputes with a PyTorch form backward, keeping
its inputs alone. The chunk form has a backward of its own, in chunk.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .reference import differentiable_once

LIBRARY = torch.library.Library("mdnbench", "FRAGMENT")

# Arguments of every operator, in the order of the public functions.
TOKEN_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_alpha, Tensor log_mu, Tensor? p, Tensor? beta, Tensor? eta, float? scale"
)
OPTIONS = "Tensor? cu_seqlens, bool use_qk_l2norm_in_kernel, bool use_p_times_alpha"
STATE = "Tensor? initial_state, bool output_final_state"

Operator = Callable[..., tuple[Tensor, Tensor | None]]


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else nullcontext()


def register(name: str, launch: Operator, reference: Operator) -> Operator:
    """Register `mdnbench::<name>` and return the function that calls it.

    Args:
        name: of the operator.
        launch: runs the kernels; takes the arguments of the public function in order.
        reference: the PyTorch form, differentiable, with the same arguments.
    """
    schema = f"{TOKEN_ARGUMENTS}, {STATE}, {OPTIONS}"
    LIBRARY.define(f"{name}({schema}) -> (Tensor, Tensor)")

    def run(*arguments) -> tuple[Tensor, Tensor]:
        o, final_state = launch(*arguments)
        # A result cannot be None here: without `output_final_state` the state is an empty tensor.
        return o, o.new_empty(0, dtype=torch.float32) if final_state is None else final_state

    def fake(
        q, k, v, log_alpha, log_mu, p, beta, eta, scale, initial_state, output_final_state, cu_seqlens, *options
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state_shape = (2, N, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
        return v.new_empty(v.shape), v.new_empty(state_shape, dtype=torch.float32)

    def save(ctx, inputs, output) -> None:
        *tensors, ctx.scale, initial_state, ctx.output_final_state, cu_seqlens = inputs[:12]
        ctx.options = inputs[12:]
        ctx.save_for_backward(*tensors, initial_state, cu_seqlens)

    @differentiable_once
    def backward(ctx, do: Tensor, dfinal_state: Tensor):
        *tensors, cu_seqlens = (None if x is None else x.detach() for x in ctx.saved_tensors)
        wanted = [*ctx.needs_input_grad[:8], ctx.needs_input_grad[9]]
        leaves = [x.requires_grad_() for x, wants in zip(tensors, wanted) if wants]
        *token_tensors, initial_state = tensors
        with torch.enable_grad():
            o, final_state = reference(
                *token_tensors, ctx.scale, initial_state, ctx.output_final_state, cu_seqlens, *ctx.options
            )
            results, arriving = [o], [do.to(o.dtype)]
            if ctx.output_final_state and final_state.requires_grad:  # not so where q is the only leaf
                results, arriving = [*results, final_state], [*arriving, dfinal_state]
            computed = iter(torch.autograd.grad(results, leaves, arriving, materialize_grads=True))
        *grads, dinitial_state = [next(computed) if wants else None for wants in wanted]
        return *grads, None, dinitial_state, None, None, *(None for _ in ctx.options)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mdnbench::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"mdnbench::{name}", backward, setup_context=save, lib=LIBRARY)
    operator = getattr(torch.ops.mdnbench, name).default

    def call(*arguments) -> tuple[Tensor, Tensor | None]:
        o, final_state = operator(*arguments)
        return o, final_state if arguments[10] else None

    return call
