"""The public MDN operators: documentation, argument checks, and the choice of the code that runs.

Signatures, defaults, state layout and meaning are those of the functions of the same names in fla-core 0.6.0.
Beyond those: float32 and float64, `cu_seqlens`, value heads in groups, chunk size 128, inputs of any strides,
`save_memory`.
"""

from __future__ import annotations

import math
import weakref
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .reference import chunk_mdn, recurrent_mdn

CHUNK_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def chunk_momentum_delta_rule(
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
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    use_p_times_alpha: bool = True,
    chunk_size: int = 64,
    save_memory: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Momentum DeltaNet (MDN), a linear-attention operator, computed in chunks of tokens.

    For one value head, with state S and momentum M of [K, V]:

        w_t = p_t^T S_{t-1} - v_t
        M_t = mu_t M_{t-1} + eta_t k_t w_t
        S_t = alpha_t S_{t-1} - beta_t M_t
        o_t = scale * q_t^T S_t

    (Huang et al., arXiv 2605.05838.) mu = 0 and beta = 1 give the gated delta rule. Differentiable once with respect
    to every tensor but `cu_seqlens`. Log gates may be -inf.

    Args:
        q, k: [B, T, H, K], T >= 1; float16, bfloat16, float32 or float64, as are v and p: all four the same.
        v: [B, T, HV, V], HV a multiple of H: value head h goes with head h // (HV // H) of q, k and p.
        log_alpha: [B, T, HV], log of the decay of S, alpha in [0, 1]; any of the dtypes above, as is every gate.
        log_mu: [B, T, HV], log of the decay of M, mu in [0, 1].
        p: [B, T, H, K], what S is read with for the prediction of v; None means k.
        beta: [B, T, HV], how much of M enters S, in [0, 1]; None means 1.
        eta: [B, T, HV], the learning rate of a token, in (0, 2); None means 1.
        scale: factor of the output; None means K ** -0.5.
        initial_state: [2, N, HV, K, V], S and M before the first token; None means zeros. N is B, or the number of
            sequences in `cu_seqlens`. Any of the dtypes above.
        output_final_state: whether to return S and M after the last token.
        cu_seqlens: [N + 1] int32 or int64, on q's device or on the CPU: sequence n is tokens cu_seqlens[n] up to
            cu_seqlens[n + 1] of the one row of a batch of B = 1. From 0 to T; sequences may be empty. Its values are
            checked on the host: those on a GPU, where that synchronises, when a tensor is seen first; none under
            torch.compile and CUDA-graph capture.
        use_qk_l2norm_in_kernel: whether q, k and p are divided by their L2 norms first: x / sqrt(sum x^2 + 1e-6).
        use_p_times_alpha: whether p_t is multiplied by alpha_t, so that the prediction is made with the decayed state.
        chunk_size: tokens a chunk: 16, 32, 64 or 128. Changes speed and memory, not the result beyond rounding.
        save_memory: whether the Triton kernels keep less for the backward pass, and need less in it, for more time.

    Returns:
        o [B, T, HV, V] in q's dtype, and the final state [2, N, HV, K, V] in float32 (float64 for float64 inputs), or
        None unless `output_final_state`.

    Raises:
        ValueError: naming the argument, what it is and what it may be. On a GPU also for K above 256, and for a chunk
            size that the GPU's shared memory cannot hold at these dimensions.
    """
    arguments = _checked(
        q, k, v, log_alpha, log_mu, p, beta, eta, scale, initial_state, output_final_state, cu_seqlens,
        use_qk_l2norm_in_kernel, use_p_times_alpha,
    )  # fmt: skip
    if not isinstance(chunk_size, int) or chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size={chunk_size!r} is not offered: use {_listed(CHUNK_SIZES)}")
    if q.is_cuda and q.dtype != torch.float64:
        from .chunk import chunk_triton  # here, so that Triton is needed on GPUs alone

        return chunk_triton(*arguments.values(), chunk_size, save_memory=save_memory)
    return chunk_mdn(**arguments, chunk_size=chunk_size)


def fused_recurrent_momentum_delta_rule(
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
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    use_p_times_alpha: bool = True,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Momentum DeltaNet (MDN) token by token, for decoding and short sequences.

    Arguments, results and errors are those of `chunk_momentum_delta_rule`, without `chunk_size` and `save_memory`, and
    with `inplace`.
    Computes in float32 (float64 for float64 inputs). A backward pass keeps the states of every token: use the chunk
    form for training.

    Args:
        inplace: whether the final state overwrites `initial_state`, which is then the state returned. It must be
            contiguous and float32 (float64 for float64 inputs), `output_final_state` True, and no gradient recorded.
    """
    arguments = _checked(
        q, k, v, log_alpha, log_mu, p, beta, eta, scale, initial_state, output_final_state, cu_seqlens,
        use_qk_l2norm_in_kernel, use_p_times_alpha,
    )  # fmt: skip
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if inplace:
        _check_inplace(arguments, compute_dtype)
    if q.is_cuda and compute_dtype == torch.float32:
        from .recurrent import recurrent_triton  # here, so that Triton is needed on GPUs alone

        return recurrent_triton(*arguments.values(), inplace=inplace)
    o, final_state = recurrent_mdn(**arguments, compute_dtype=compute_dtype)
    if inplace:
        final_state = initial_state.copy_(final_state)
    return o.to(q.dtype), final_state


def _check_inplace(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    state = arguments["initial_state"]
    if state is None:
        raise ValueError("initial_state is None: pass the state that inplace=True is to overwrite")
    if state.dtype != dtype:
        raise ValueError(f"initial_state has dtype {state.dtype}: convert it to {dtype}, which inplace=True writes")
    if not state.is_contiguous():
        raise ValueError(f"initial_state has strides {list(state.stride())}: inplace=True needs a contiguous one")
    if not arguments["output_final_state"]:
        raise ValueError("output_final_state is False: set it to True for inplace=True, which writes that state")
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments.values()):
        raise ValueError("inplace=True overwrites what a backward pass needs: call under torch.no_grad()")


def _checked(
    q, k, v, log_alpha, log_mu, p, beta, eta, scale, initial_state, output_final_state, cu_seqlens,
    use_qk_l2norm_in_kernel, use_p_times_alpha,
) -> dict[str, Any]:  # fmt: skip
    """The arguments by name, in order, checked; cu_seqlens on q's device."""
    _check_tensor("q", q, None)
    device, shape = q.device, q.shape
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"q has shape {_shape(q)}: it must be [B, T, H, K], each at least 1")
    B, T, H, K = shape
    dtype = (q.dtype,)
    _check_tensor("v", v, device, dtypes=dtype)
    if v.ndim != 4 or v.shape[:2] != shape[:2] or 0 in v.shape:
        raise ValueError(f"v has shape {_shape(v)}: it must be [B, T, HV, V] with B, T = {B}, {T} as in q")
    HV, V = v.shape[2:]
    if HV % H:
        raise ValueError(f"v has {HV} heads: use a multiple of the {H} heads of q and k")
    _check_tensor("k", k, device, shape, "[B, T, H, K], the shape of q", dtype)
    if p is not None:
        _check_tensor("p", p, device, shape, "[B, T, H, K], the shape of q", dtype)
    shape = (B, T, HV)
    _check_tensor("log_alpha", log_alpha, device, shape, "[B, T, HV]")
    _check_tensor("log_mu", log_mu, device, shape, "[B, T, HV]")
    if beta is not None:
        _check_tensor("beta", beta, device, shape, "[B, T, HV]")
    if eta is not None:
        _check_tensor("eta", eta, device, shape, "[B, T, HV]")
    # Not math.isfinite, which torch.compile cannot trace for a scale that varies.
    if scale is not None and not (isinstance(scale, Real) and abs(scale) < math.inf):
        raise ValueError(f"scale={scale!r} must be a finite number, or None for K ** -0.5")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
        cu_seqlens = cu_seqlens.to(q.device)
    if initial_state is not None:
        sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
        _check_tensor("initial_state", initial_state, device, (2, sequences, HV, K, V), "[2, N, HV, K, V]")
    return {
        "q": q,
        "k": k,
        "v": v,
        "log_alpha": log_alpha,
        "log_mu": log_mu,
        "p": p,
        "beta": beta,
        "eta": eta,
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_p_times_alpha": use_p_times_alpha,
    }


def _check_tensor(
    name: str,
    x: Any,
    device: torch.device | None,
    shape: tuple[int, ...] | None = None,
    meaning: str = "",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}: pass a torch.Tensor")
    if x.dtype not in dtypes:
        remedy = f"convert it to {_listed(dtypes)}" + (", the dtype of q" if len(dtypes) == 1 else "")
        raise ValueError(f"{name} has dtype {x.dtype}: {remedy}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}: move it to {device}, the device of q")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name} has shape {_shape(x)}: it must be {list(shape)} ({meaning})")


def _check_cu_seqlens(cu_seqlens: Any, q: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}: pass a torch.Tensor of int32 or int64")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}: convert it to torch.int32 or torch.int64")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens has shape {_shape(cu_seqlens)}: it must be [N + 1] with N of at least 1")
    if cu_seqlens.device not in (q.device, torch.device("cpu")):
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}: move it to {q.device}, the device of q, or to the CPU")
    batch, seq_len = q.shape[:2]
    if batch != 1:
        raise ValueError(f"q has batch size {batch} beside cu_seqlens: pack the sequences into a batch of 1")
    if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # values cannot be read here
    _check_bounds(cu_seqlens, seq_len)


_bounds_seen: tuple[weakref.ref[Tensor], int, int] | None = None  # the last cu_seqlens, its version, its tokens


def _check_bounds(cu_seqlens: Tensor, seq_len: int) -> None:
    """Check the values, on a GPU once: reading them synchronises, and the layers of a model pass the same tensor. On
    the CPU reading is free, and NumPy may change what it shares without a new version."""
    global _bounds_seen
    version = -1 if cu_seqlens.is_inference() or not cu_seqlens.is_cuda else cu_seqlens._version
    if _bounds_seen and _bounds_seen[0]() is cu_seqlens and _bounds_seen[1:] == (version, seq_len) and version >= 0:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens starts at {bounds[0]}: it must start at 0")
    if bounds[-1] != seq_len:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}: it must end at {seq_len}, the number of tokens in q")
    for begin, end in pairwise(bounds):
        if end < begin:
            raise ValueError(f"cu_seqlens goes from {begin} down to {end}: it must not decrease")
    _bounds_seen = (weakref.ref(cu_seqlens), version, seq_len)


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _listed(choices: tuple[Any, ...]) -> str:
    *head, last = map(str, choices)
    return f"{', '.join(head)} or {last}" if head else last
