"""Momentum DeltaNet (Huang et al., arXiv 2605.05838): the operator of `mdnbench.kernels`.

    w_t = alpha_t k_t^T S_{t-1} - v_t
    M_t = mu_t M_{t-1} + eta_t k_t w_t
    S_t = alpha_t S_{t-1} - beta_t M_t
    o_t = K^-0.5 q_t^T S_t

with q and k L2-normalised.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mdnbench.kernels import chunk_momentum_delta_rule
from mdnbench.kernels.config import choose_backward_config, choose_config
from mdnbench.kernels.reference import chunk_mdn, recurrent_mdn

from .packages import FLA_INSTALL, import_beside, import_from_fla
from .provider import Inputs, Operator, Provider
from .recurrence import run_segments
from .workload import BYTES_PER_ELEMENT, Workload

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


def _forward_flops(workload: Workload) -> int | None:
    """Products of one chunk of C tokens, in the notation of the chunk form in `mdnbench.kernels.reference`.

    For each query head Q K^T and K K^T; for each value head G = A diag(beta) U, the reads of both states by K and by Q,
    the product with T, (G * Q K^T) R, and the writes to both states.
    """
    w, c = workload, workload.chunk_size
    if c is None:
        return None
    of_query_head = 2 * (2 * c * c * w.head_dim_k)
    of_value_head = 2 * c * c * c + 2 * (2 * c * c * w.head_dim_v) + 6 * (2 * c * w.head_dim_k * w.head_dim_v)
    return w.chunks * (w.heads * of_query_head + w.value_heads * of_value_head)


OPERATOR = Operator(
    name="mdn",
    title="Momentum DeltaNet",
    gates=("log_alpha", "log_mu", "beta", "eta"),
    select=_select,
    truth=momentum_delta_rule_truth,
    forward_flops=_forward_flops,
)


class MdnTorch(Provider):
    """The chunk form in PyTorch, with its own backward pass. Timed: all of the operator, as of `MdnTriton`."""

    name = "mdn-torch"
    operator = OPERATOR
    chunk_sizes = (16, 32, 64, 128)

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        return lambda: chunk_mdn(**inputs, chunk_size=workload.chunk_size)[0]


class MdnTriton(Provider):
    """Our Triton kernels. Timed: all of the operator, L2 norms and gate transforms included."""

    name = "mdn-triton"
    operator = OPERATOR
    package = "triton"
    install = "pip install triton"
    devices = ("cuda",)
    chunk_sizes = (16, 32, 64, 128)

    def _supports(self, workload: Workload, mode: str) -> str | None:
        w = workload
        gpu = torch.cuda.get_device_properties() if torch.cuda.is_available() else None
        shared_memory_bytes = getattr(gpu, "shared_memory_per_block_optin", sys.maxsize)
        multiprocessors = getattr(gpu, "multi_processor_count", 1)
        heads, element_bytes = w.batch * w.value_heads, BYTES_PER_ELEMENT[w.dtype]
        shape = (w.head_dim_k, w.head_dim_v, w.chunk_size, element_bytes, heads, False)
        try:
            choose_config(*shape, shared_memory_bytes, multiprocessors)
            if mode != "forward":
                choose_backward_config(*shape, shared_memory_bytes, multiprocessors)
        except ValueError as error:
            return str(error)
        return None

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        return lambda: chunk_momentum_delta_rule(**inputs, chunk_size=workload.chunk_size)[0]


class _OfTheAuthors(Provider):
    """What the two published implementations have in common: their inputs, a value head for each query head, and a
    chunk form that loses its digits.

    With A_i and M_i the sums of log_alpha and log_mu from the start of the chunk, and c_i the sum of
    (beta_l + 1e-6) exp(M_l - A_l) over l <= i, token j enters the state after token i with the coefficient
    exp(A_i - M_j) (c_i - c_{j-1}). Where momentum decays within a chunk the difference cancels and the factor grows,
    in float32 to infinity. It is right where alpha forgets within few tokens (profiles "layer" and "log_alpha=-5").
    At "mild", 257 tokens and K = V = 64, fla-core's PyTorch form is off by 0.3 to 1.3 in float32 with chunks of 64 (16
    sets of inputs), by up to 1.9e-3 with 32 and 1.2e-5 with 16; by 2e-6 with float64 in place of float32.
    """

    operator = OPERATOR
    devices = ("cuda",)
    dtypes = ("float16", "bfloat16")

    def _supports(self, workload: Workload, mode: str) -> str | None:
        if workload.value_heads != workload.heads:
            return f"needs as many value heads as query heads, not {workload.value_heads} for {workload.heads}"
        return None


class MdnFla(_OfTheAuthors):
    """fla-core's `chunk_momentum_delta_rule`: the published chunk form in PyTorch, which backward runs a second time.

    Timed: the L2 norms of q, k and p (Triton kernels), p = alpha k, eta k, and the chunk form.
    """

    name = "mdn-fla"
    package = "fla.ops.momentum_delta_rule"
    install = FLA_INSTALL
    chunk_sizes = (16, 32, 64)

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        run = import_from_fla("fla.ops.momentum_delta_rule").chunk_momentum_delta_rule
        return lambda: run(**inputs, chunk_size=workload.chunk_size)[0]


AUTHORS_PATH = "MDNBENCH_AUTHORS_PATH"
AUTHORS_REPOSITORY = "https://github.com/HuuYuLong/MomentumDeltaNet"


class MdnAuthors(_OfTheAuthors):
    """The authors' research code, Triton kernels of the published chunk form, from a checkout that the user provides.

    Timed: the L2 norms of q, k and p, p = alpha k, eta k, and the chunk form, with chunks of 64. Its package is called
    fla as well, so it runs in a process of its own.
    """

    name = "mdn-authors"
    built_in_chunk_size = 64
    shares_process = False

    def missing(self) -> str | None:
        """See `Provider.missing`."""
        path = os.environ.get(AUTHORS_PATH)
        if not path:
            return f"the authors' code is not part of mdnbench: clone {AUTHORS_REPOSITORY} and set {AUTHORS_PATH} to it"
        if not (_authors_package(path) / "fla" / "ops" / "momentum_delta_rule").is_dir():
            return f"{AUTHORS_PATH}={path!r} is no checkout of {AUTHORS_REPOSITORY}"
        return None

    def _supports(self, workload: Workload, mode: str) -> str | None:
        if workload.head_dim_k > 256:
            return f"takes head_dim_k up to 256 only, not {workload.head_dim_k}"
        triton = metadata.version("triton")
        if tuple(int(part) for part in triton.split(".")[:2]) >= (3, 9):
            return f"needs tl.make_block_ptr, which Triton {triton} no longer has: use Triton 3.8 or older"
        return super()._supports(workload, mode)

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        run = _import_authors(Path(os.environ[AUTHORS_PATH])).chunk_mode_rule
        return lambda: run(**inputs)[0]


def _authors_package(checkout: str | Path) -> Path:
    return Path(checkout) / "flash-linear-attention"


def _import_authors(checkout: Path) -> ModuleType:
    """`fla.ops.momentum_delta_rule` of the checkout; from then on every `fla` in this process is the authors'."""
    package = str(_authors_package(checkout).resolve())
    loaded = sys.modules.get("fla")
    if loaded is not None and not str(loaded.__spec__.origin).startswith(package):
        raise RuntimeError("another package called fla is loaded in this process: mdn-authors needs one of its own")
    if package not in sys.path:
        sys.path.insert(0, package)
    # Read and never set by fla/utils.py where Triton can keep autotuning results on disk; set here as fla-core does.
    builtins.FLA_CACHE_RESULTS = os.environ.get("FLA_CACHE_RESULTS", "1") == "1"
    return import_beside("fla.ops.momentum_delta_rule", "fla", "fla.ops", "fla.modules")
