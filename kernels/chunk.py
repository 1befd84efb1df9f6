"""The chunk form as an operator of PyTorch: forward and backward registered, so that torch.compile keeps calls whole.

`mdnbench::chunk_mdn` returns, beside its results, what its backward needs: a function of torch.library can hand that on
in no other way. Where something is not there, an empty tensor stands for it, since a result cannot be None.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backward import chunk_backward
from .config import choose_backward_config
from .forward import chunk_forward
from .gates import N_ROWS
from .library import LIBRARY, OPTIONS, STATE, TOKEN_ARGUMENTS
from .problem import limits_of
from .reference import differentiable_once
from .slots import count_slots

LIBRARY.define(
    f"chunk_mdn({TOKEN_ARGUMENTS}, {STATE}, {OPTIONS}, int chunk_size, bool for_backward, bool save_memory) "
    "-> (Tensor o, Tensor final_state, Tensor inverse, Tensor coefficients, Tensor low, Tensor errors)"
)
LIBRARY.define(
    f"chunk_mdn_backward({TOKEN_ARGUMENTS}, Tensor? initial_state, {OPTIONS}, int chunk_size, Tensor inverse, "
    "Tensor coefficients, Tensor? low, Tensor? errors, Tensor? o, Tensor do, Tensor? dfinal_state, bool[] wanted) "
    "-> Tensor[]"
)


def _or_none(x: Tensor | None) -> Tensor | None:
    return x if x is not None and x.numel() else None


def _check_backward_fits(
    q, k, v, log_alpha, log_mu, p, beta, eta, scale, state, want_state, cu_seqlens, *options
) -> None:
    """Raise where the forward would run and the backward, later, would not."""
    sequences = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (q.shape[3], v.shape[3], options[-1], q.element_size(), sequences * v.shape[2], p is not None)
    choose_backward_config(*shape, *limits_of(q.device))


def _forward(*arguments) -> tuple[Tensor, ...]:
    *arguments, for_backward, save_memory = arguments
    if for_backward:
        _check_backward_fits(*arguments)
    o, final_state, *kept = chunk_forward(*arguments, keep_errors=for_backward and not save_memory)
    kept = kept if for_backward else [None] * 4
    nothing = (o.new_empty(0, dtype=x) for x in (o.dtype, torch.float32, torch.float32, o.dtype))
    return (
        o,
        o.new_empty(0, dtype=torch.float32) if final_state is None else final_state,
        *(empty if x is None else x for x, empty in zip(kept, nothing)),
    )


def _forward_fake(
    q, k, v, log_alpha, log_mu, p, beta, eta, scale, initial_state, output_final_state, cu_seqlens,
    use_qk_l2norm_in_kernel, use_p_times_alpha, chunk_size, for_backward, save_memory,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, T, HV, V = v.shape
    C = chunk_size
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = count_slots(T, N, C, cu_seqlens is not None)

    def empty(*shape, dtype=None, wanted=for_backward) -> Tensor:
        return v.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        v.new_empty(v.shape),
        empty(2, N, HV, q.shape[3], V, dtype=torch.float32, wanted=output_final_state),
        empty(slots, HV, C, C),
        empty(slots, HV, N_ROWS.value, C, dtype=torch.float32),
        empty(slots, HV, 2, C, dtype=torch.float32, wanted=for_backward and q.dtype == torch.float32),
        empty(*v.shape, wanted=for_backward and not save_memory),
    )


def _backward(*arguments) -> list[Tensor]:
    grads = chunk_backward(*arguments)
    return [arguments[0].new_empty(0) if x is None else x for x in grads]


def _backward_fake(q, k, v, log_alpha, log_mu, p, beta, eta, scale, initial_state, *others) -> list[Tensor]:
    inputs = (q, k, v, log_alpha, log_mu, p, beta, eta, initial_state)
    return [x.new_empty(x.shape) if wanted else q.new_empty(0) for x, wanted in zip(inputs, others[-1])]


def _save(ctx, inputs, output) -> None:
    """Keep what the backward needs; of `output` what comes after o and the final state may be None."""
    *tokens, ctx.scale, initial_state, ctx.output_final_state, cu_seqlens, norm, times_alpha, chunk_size, _, _ = inputs
    ctx.options = (norm, times_alpha, chunk_size)
    o = output[0] if norm else None  # the gradient through the L2 norm needs it
    ctx.save_for_backward(*tokens, initial_state, cu_seqlens, *output[2:], o)
    ctx.set_materialize_grads(False)


def _save_registered(ctx, inputs, output) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[2:])


def _differentiate_by(compute: Callable) -> Callable:
    """The backward pass, by `chunk_backward` or by the operator that is registered for it."""

    @differentiable_once
    def differentiate(ctx, do: Tensor | None, dfinal_state: Tensor | None, *_):
        *tokens, initial_state, cu_seqlens, inverse, coefficients, low, errors, o = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:8], ctx.needs_input_grad[9]]
        if not inverse.numel():
            raise RuntimeError("chunk_mdn kept nothing for its backward pass: call it with for_backward=True")
        grads = compute(
            *tokens, ctx.scale, initial_state, cu_seqlens, *ctx.options,
            inverse, coefficients, _or_none(low), _or_none(errors), o,
            torch.zeros_like(tokens[2]) if do is None else do,
            dfinal_state if ctx.output_final_state else None,
            wanted,
        )  # fmt: skip
        *dtokens, dinitial_state = (x if want else None for x, want in zip(grads, wanted))
        return *dtokens, None, dinitial_state, *[None] * 7

    return differentiate


LIBRARY.impl("chunk_mdn", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("chunk_mdn_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("mdnbench::chunk_mdn", _forward_fake, lib=LIBRARY)
torch.library.register_fake("mdnbench::chunk_mdn_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "mdnbench::chunk_mdn",
    _differentiate_by(torch.ops.mdnbench.chunk_mdn_backward),
    setup_context=_save_registered,
    lib=LIBRARY,
)


class _Eager(torch.autograd.Function):
    """The same as the registered operator, without what its dispatch takes of the host's time. (Nor is there a
    `setup_context`, for which PyTorch would bind the arguments to a signature.)"""

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, Tensor | None]:
        *of_forward, _, save_memory = arguments
        _check_backward_fits(*of_forward)
        results = chunk_forward(*of_forward, keep_errors=not save_memory)
        _save(ctx, arguments, results)
        return results.o, results.final_state

    backward = staticmethod(_differentiate_by(chunk_backward))


def _is_eager(q: Tensor) -> bool:
    """Whether nothing traces, counts or transforms calls."""
    return (
        type(q) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
    )


def chunk_triton(*arguments, save_memory: bool = False) -> tuple[Tensor, Tensor | None]:
    """`chunk_momentum_delta_rule` with its arguments in order, checked, by the Triton kernels.

    Args:
        save_memory: as there.
    """
    # Inside a transform such as vmap a tensor does not say whether the one that it wraps requires gradients.
    for_backward = torch.is_grad_enabled() and (
        torch._C._are_functorch_transforms_active()
        or any(x.requires_grad for x in (*arguments[:8], arguments[9]) if x is not None)
    )
    if not _is_eager(arguments[0]):
        o, final_state, *_ = torch.ops.mdnbench.chunk_mdn(*arguments, for_backward, save_memory)
        return o, final_state if arguments[10] else None
    if for_backward:
        return _Eager.apply(*arguments, for_backward, save_memory)
    return chunk_forward(*arguments)[:2]
