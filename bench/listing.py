"""What each provider can do on this machine, asked from the providers themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mdnbench.baselines.provider import Provider
from mdnbench.baselines.registry import get_provider
from mdnbench.baselines.workload import DTYPES, Workload

from .results import Point

ASKED_SEQ_LEN, ASKED_HEAD_DIM = 512, 128  # the head dimension that every kernel has


@dataclass(frozen=True)
class Capabilities:
    """What a provider takes on one device, on a usual shape (512 tokens, 4 heads, K = V = 128).

    Attributes:
        provider, operator, operator_title: names.
        reason: why it can do nothing here, in one sentence; None when it can do something.
        dtypes, modes: those it takes here.
        chunk_sizes: None when it has no such parameter.
        cuda_graph: whether it may be replayed from a CUDA graph; False on a CPU.
    """

    provider: str
    operator: str
    operator_title: str
    device: str
    reason: str | None
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    chunk_sizes: tuple[int, ...] | None
    cuda_graph: bool


def capabilities(provider: Provider, device: str) -> Capabilities:
    """Ask one provider. `device` is "cpu" or "cuda"."""
    chunk_sizes = provider.chunk_sizes
    usual = 64 if chunk_sizes is None or 64 in chunk_sizes else chunk_sizes[0]

    def refusal(dtype: str, mode: str, chunk_size: int = usual) -> str | None:
        workload = Workload(
            ASKED_SEQ_LEN, ASKED_HEAD_DIM, ASKED_HEAD_DIM, chunk_size=chunk_size, dtype=dtype, device=device
        )
        try:
            return provider.supports(workload, mode)
        except Exception as fault:  # a third party's own `supports`: a reason, not the end of the list
            return f"its own check failed: {type(fault).__name__}: {fault}"

    refusals = {(dtype, mode): refusal(dtype, mode) for dtype in DTYPES for mode in provider.modes}
    taken = [pair for pair, reason in refusals.items() if reason is None]
    dtypes = tuple(dict.fromkeys(dtype for dtype, _ in taken))
    return Capabilities(
        provider=provider.name,
        operator=provider.operator.name,
        operator_title=provider.operator.title,
        device=device,
        reason=None if taken else next(iter(refusals.values()), "it has no modes"),
        dtypes=dtypes,
        modes=tuple(dict.fromkeys(mode for _, mode in taken)),
        chunk_sizes=chunk_sizes
        and tuple(size for size in chunk_sizes if any(refusal(*pair, size) is None for pair in taken)),
        cuda_graph=provider.cuda_graph and device == "cuda" and bool(taken),
    )


def refused_chunk_sizes(points: Sequence[Point]) -> list[str]:
    """A sentence for each chunk size that a provider of these points does not take: they will have no time."""
    of_points = Counter((point.provider, point.workload.chunk_size) for point in points)
    taken = {name: get_provider(name).chunk_sizes for name, _ in of_points}
    return [
        f"{name} takes chunk sizes {', '.join(map(str, taken[name]))} only, not {size}: {count} points get no time"
        for (name, size), count in of_points.items()
        if size is not None and size not in taken[name]
    ]
