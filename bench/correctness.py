"""Whether a provider computes its operator: output and gradients against the float64 truth. Runs in the worker process.

Inputs are drawn from another seed than those that are timed. Long sequences are checked on their first length up to
`MAX_CHECKED_SEQ_LEN`, because the truth goes token by token; the row says which.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mdnbench.baselines.inputs import make_inputs, truth_of
from mdnbench.baselines.provider import Inputs, Operator, Provider
from mdnbench.baselines.workload import Workload

from .measure import open_call, returning_tensor
from .metrics import tolerance

MAX_CHECKED_SEQ_LEN = 512  # a multiple of every usual chunk size
MAX_CHECKED_BATCH = 2  # a second sequence shows what the first cannot: offsets into the batch
TRUTHS_KEPT = 16

_MALLOPT_PERTURB = -6  # M_PERTURB of glibc's malloc.h
_PERTURB_BYTE = 0x80  # new memory is filled with its complement 0x7f: NaN in float16, 3.4e38 in float32 and bfloat16


@dataclass(frozen=True)
class Check:
    """What a check found. `reason` is None when every error is within its tolerance."""

    relative_error: dict[str, float]  # by tensor name: "o", "dq", "dlog_alpha", ...
    checked_seq_len: int
    reason: str | None


def relative_error(x: Tensor, truth: Tensor) -> float:
    """||x - truth|| / ||truth|| in float64, ||x|| where the truth is zero; NaN where x holds NaN."""
    difference = (x.detach().double() - truth).norm().item()
    scale = truth.norm().item()
    return difference / scale if scale else difference


def checked_workload(provider: Provider, workload: Workload, mode: str) -> Workload:
    """The workload that is checked in place of `workload`: shortened, unless the provider cannot run it so."""
    short = workload.with_(
        seq_len=min(workload.seq_len, MAX_CHECKED_SEQ_LEN), batch=min(workload.batch, MAX_CHECKED_BATCH)
    )
    return short if provider.supports(short, mode) is None else workload


def check(provider: Provider, workload: Workload, mode: str, seed: int, device: torch.device) -> Check:
    """Run the provider on fresh inputs and compare with the truth; gradients too in the modes that have a backward.

    Args:
        provider: what is checked.
        workload: the workload that is timed; see `checked_workload`.
        mode: one of `results.MODES`.
        seed: of the timed inputs.
        device: where to run.

    Raises:
        ArithmeticError: when the truth itself is not finite.
    """
    return _check(provider, checked_workload(provider, workload, mode), mode != "forward", seed + 1, device)


@functools.lru_cache(maxsize=256)  # the same for every length above the one checked, and for both modes with a backward
def _check(provider: Provider, workload: Workload, gradients: bool, seed: int, device: torch.device) -> Check:
    operator = provider.operator
    truth, d_truth = _truth(operator, workload.with_(chunk_size=None), seed, device)
    inputs, d_output = make_inputs(operator, workload, seed, device, requires_grad=gradients)
    call = returning_tensor(provider.build(workload, inputs), provider.name)
    with poisoned_memory(truth.shape, d_output.dtype, device):
        found = {"o": call() if gradients else open_call(call, "forward", [], d_output)()}
        if found["o"].shape == truth.shape and gradients:
            names = list(inputs)
            grads = torch.autograd.grad(found["o"], [inputs[name] for name in names], d_output, allow_unused=True)
            # No gradient says that the output does not depend on this input, which may be so.
            found |= {
                f"d{name}": torch.zeros_like(inputs[name]) if grad is None else grad for name, grad in zip(names, grads)
            }
    errors: dict[str, float] = {}
    for name, x in found.items():
        expected = truth if name == "o" else d_truth[name[1:]]
        dtype = d_output.dtype if name == "o" else inputs[name[1:]].dtype
        if x.shape != expected.shape or x.dtype != dtype:
            reason = f"{name} is {_describe(x.shape, x.dtype)}, not {_describe(expected.shape, dtype)}"
            return Check(errors, workload.seq_len, reason)
        errors[name] = relative_error(x, expected.to(device))
    return Check(errors, workload.seq_len, _judge(errors, workload))


@functools.lru_cache(maxsize=TRUTHS_KEPT)
def _truth(operator: Operator, workload: Workload, seed: int, device: torch.device) -> tuple[Tensor, Inputs]:
    """Kept in host memory, so that it takes none from the providers on a GPU."""
    inputs, d_output = make_inputs(operator, workload, seed, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps of one token are too small to share: a second thread only gets in the way
    try:
        output, grads = truth_of(operator, workload, inputs, d_output)
    finally:
        torch.set_num_threads(threads)
    for name, x in {"o": output, **grads}.items():
        if not x.isfinite().all():
            raise ArithmeticError(f"the float64 truth of {operator.name} is not finite in {name}: {workload.label()}")
    return output.cpu(), {name: x.cpu() for name, x in grads.items()}


def _judge(errors: dict[str, float], workload: Workload) -> str | None:
    """One sentence on the tensor that is furthest beyond its tolerance, None when there is none."""

    def excess(name: str) -> float:
        error = errors[name]
        return math.inf if not math.isfinite(error) else error / tolerance(workload.dtype, name)

    worst = max(errors, key=excess)
    if excess(worst) <= 1:
        return None
    if not math.isfinite(errors[worst]):
        return f"{worst} holds NaN or infinity at {workload.seq_len} tokens"
    allowed = tolerance(workload.dtype, worst)
    return f"{worst} has a relative error of {errors[worst]:.2g} at {workload.seq_len} tokens, {allowed:g} is allowed"


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


@contextmanager
def poisoned_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Makes it likely that memory which is allocated here and never written holds NaN or huge numbers, not zeros.

    On CUDA, blocks of the output's size are filled with NaN and released: the allocator hands them out again. On a CPU
    glibc is told to fill new memory; other C libraries cannot, and nothing is done.
    """
    if device.type == "cuda":
        released = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(4)]
        del released
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MALLOPT_PERTURB, _PERTURB_BYTE)
    try:
        yield
    finally:
        mallopt(_MALLOPT_PERTURB, 0)
