"""Causal softmax attention, o_t = sum_{s <= t} softmax_s(K^-0.5 q_t^T k_s) v_s, by others' kernels.

One provider for each backend of `torch.nn.functional.scaled_dot_product_attention`, pinned to it, and one for each
generation of the FlashAttention packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .provider import Inputs, Operator, Provider
from .recurrence import group_heads
from .workload import BYTES_PER_ELEMENT, Workload

QUERIES_PER_BLOCK = 256
MAX_FUSED_HEAD_DIM = 256


def _select(workload: Workload, inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in "qkv"}


def softmax_attention_truth(workload: Workload, inputs: Inputs) -> Tensor:
    """By the definition. q, k [B, T, H, K], v [B, T, HV, V] to [B, T, HV, V]."""
    q, k = (group_heads(inputs[x], workload.value_heads).transpose(1, 2) for x in "qk")  # [B, HV, T, K]
    v = inputs["v"].transpose(1, 2)

    def rows(q_block: Tensor, k_seen: Tensor, v_seen: Tensor) -> Tensor:
        scores = workload.head_dim_k**-0.5 * q_block @ k_seen.mT
        n_rows, n_seen = scores.shape[-2:]
        is_future = torch.ones(n_rows, n_seen, dtype=torch.bool, device=q.device).triu(n_seen - n_rows + 1)
        return scores.masked_fill(is_future, -torch.inf).softmax(-1) @ v_seen

    blocks = []
    for start in range(0, workload.seq_len, QUERIES_PER_BLOCK):
        end = min(start + QUERIES_PER_BLOCK, workload.seq_len)
        # Recomputed in backward: the scores of all blocks together would be quadratic in the sequence length.
        arguments = (q[..., start:end, :], k[..., :end, :], v[..., :end, :])
        blocks.append(checkpoint(rows, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(blocks, -2).transpose(1, 2)


def _forward_flops(workload: Workload) -> int:
    """Q K^T and P V for each value head, of which causality leaves T (T + 1) / 2 pairs of tokens a sequence."""
    w = workload
    pairs = w.batch * w.value_heads * w.seq_len * (w.seq_len + 1) // 2
    return pairs * 2 * (w.head_dim_k + w.head_dim_v)


OPERATOR = Operator(
    name="attention",
    title="Softmax attention",
    gates=(),
    select=_select,
    truth=softmax_attention_truth,
    forward_flops=_forward_flops,
)


class _Sdpa(Provider):
    """`scaled_dot_product_attention` pinned to one backend. Timed: all of it, and the choice of the backend."""

    operator = OPERATOR
    backend: ClassVar[SDPBackend]

    def _supports(self, workload: Workload, mode: str) -> str | None:
        return _ungrouped(workload) or self._supports_head_dims(workload) or self._asked_of_torch(workload, mode)

    def _supports_head_dims(self, workload: Workload) -> str | None:
        """Conditions of the backend on the head dimensions."""
        return None

    def _asked_of_torch(self, workload: Workload, mode: str) -> str | None:
        """What PyTorch says on this GPU; None where there is no GPU to ask about."""
        can_use = {
            SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
            SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
            SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
        }.get(self.backend)
        if can_use is None or workload.device != "cuda" or not torch.cuda.is_available():
            return None
        q, k, v = (
            torch.empty(
                (1, 1, min(workload.seq_len, 128), head_dim),
                dtype=getattr(torch, workload.dtype),
                device="cuda",
                requires_grad=mode != "forward",
            )
            for head_dim in (workload.head_dim_k, workload.head_dim_k, workload.head_dim_v)
        )
        # Positional: the attention mask, the dropout, whether it is causal, whether heads are grouped.
        if can_use(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, False)):
            return None
        gpu = torch.cuda.get_device_name()
        return f"PyTorch has no such kernel for {workload.label()} on {gpu} (PyTorch {torch.__version__})"

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""

        def run() -> Tensor:
            q, k, v = (inputs[x].transpose(1, 2) for x in "qkv")
            with sdpa_kernel(self.backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return run


class SdpaFlash(_Sdpa):
    """FlashAttention-2 on a GPU, PyTorch's own flash kernel on a CPU."""

    name = "attention-sdpa-flash"
    backend = SDPBackend.FLASH_ATTENTION

    def _supports_head_dims(self, workload: Workload) -> str | None:
        k, v = workload.head_dim_k, workload.head_dim_v
        if k != v:
            return f"needs head_dim_v equal to head_dim_k, not {v} beside {k}"
        if workload.device == "cpu":
            return None
        if workload.dtype == "float32":
            return "takes float16, bfloat16 only on a GPU, not float32"
        return _at_most_256(workload)


class SdpaCudnn(_Sdpa):
    """cuDNN's fused attention."""

    name = "attention-sdpa-cudnn"
    backend = SDPBackend.CUDNN_ATTENTION
    devices = ("cuda",)
    dtypes = ("float16", "bfloat16")

    def _supports_head_dims(self, workload: Workload) -> str | None:
        return _at_most_256(workload) or _in_multiples_of(8, workload)


class SdpaEfficient(_Sdpa):
    """Memory-efficient attention, from xFormers."""

    name = "attention-sdpa-efficient"
    backend = SDPBackend.EFFICIENT_ATTENTION
    devices = ("cuda",)

    def _supports_head_dims(self, workload: Workload) -> str | None:
        return _in_multiples_of(16 // BYTES_PER_ELEMENT[workload.dtype], workload)  # 16-byte loads


class SdpaMath(_Sdpa):
    """Plain matrix products: runs everywhere, with memory quadratic in the sequence length."""

    name = "attention-sdpa-math"
    backend = SDPBackend.MATH


class _FlashAttention(Provider):
    """A release of FlashAttention, `flash_attn_func(q, k, v, causal=True)`; all of it is timed.

    The packages share keys and values among query heads. A workload shares queries and keys among value heads, so there
    is nothing to group here.
    """

    operator = OPERATOR
    devices = ("cuda",)
    dtypes = ("float16", "bfloat16")

    def _supports(self, workload: Workload, mode: str) -> str | None:
        reason = _ungrouped(workload) or _at_most_256(workload) or _in_multiples_of(8, workload)
        return reason or self._supports_head_dims(workload, mode)

    def _supports_head_dims(self, workload: Workload, mode: str) -> str | None:
        """Further conditions on the head dimensions."""
        return None

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """See `Provider.build`."""
        flash_attn_func = importlib.import_module(self.package).flash_attn_func
        q, k, v = (inputs[name] for name in "qkv")

        def run() -> Tensor:
            found = flash_attn_func(q, k, v, causal=True)
            return found[0] if isinstance(found, tuple) else found  # some releases return the logsumexp too

        return run


class FlashAttention2(_FlashAttention):
    """FlashAttention-2, by CUTLASS, from Ampere on."""

    name = "attention-flash2"
    package = "flash_attn.flash_attn_interface"
    install = "pip install --no-build-isolation flash-attn"

    def _supports_head_dims(self, workload: Workload, mode: str) -> str | None:
        k, v = workload.head_dim_k, workload.head_dim_v
        return None if k == v else f"needs head_dim_v equal to head_dim_k, not {v} beside {k}"


class FlashAttention3(_FlashAttention):
    """FlashAttention-3, by CUTLASS, for Hopper."""

    name = "attention-flash3"
    package = "flash_attn_interface"
    install = "pip install --no-build-isolation ./hopper, in a clone of https://github.com/Dao-AILab/flash-attention"

    def _supports_head_dims(self, workload: Workload, mode: str) -> str | None:
        k, v = workload.head_dim_k, workload.head_dim_v
        if k == v or k <= 64 or (128 < k <= 192 and 96 < v <= 128):
            return None
        return f"takes V other than K up to K 64, or above K 128 up to 192 with V above 96 up to 128, not K {k} V {v}"


class FlashAttention4(_FlashAttention):
    """FlashAttention-4, by the CuTe DSL, for Hopper and Blackwell; compiled at the first call."""

    name = "attention-flash4"
    package = "flash_attn.cute"
    install = "pip install --pre flash-attn-4"

    def _supports_head_dims(self, workload: Workload, mode: str) -> str | None:
        k, v = workload.head_dim_k, workload.head_dim_v
        is_blackwell = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10
        if is_blackwell and max(k, v) > 128 and (k, v) not in ((192, 128), (256, 256)):
            return f"takes K and V up to 128, K 192 V 128, or K 256 V 256 on Blackwell, not K {k} V {v}"
        return None


def _ungrouped(workload: Workload) -> str | None:
    if workload.value_heads == workload.heads:
        return None
    heads = f"heads={workload.heads}, value_heads={workload.value_heads}"
    return f"needs as many value heads as query heads, not {heads}"


def _at_most_256(workload: Workload) -> str | None:
    widest = max(workload.head_dim_k, workload.head_dim_v)
    if widest > MAX_FUSED_HEAD_DIM:
        return f"takes head dimensions up to {MAX_FUSED_HEAD_DIM} only, not {widest}"
    return None


def _in_multiples_of(step: int, workload: Workload) -> str | None:
    for head_dim in (workload.head_dim_k, workload.head_dim_v):
        if head_dim % step:
            return f"takes head dimensions in multiples of {step} in {workload.dtype}, not {head_dim}"
    return None
