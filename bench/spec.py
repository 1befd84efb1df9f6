"""What a sweep measures: the specification, the points it stands for, and how long they may take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mdnbench.baselines.workload import Workload

from .results import MODES, REGIMES, Point

if TYPE_CHECKING:
    from mdnbench.baselines.provider import Provider

SETUP_LIMIT_S = {"cpu": 120.0, "cuda": 600.0}  # peers on a GPU autotune for minutes
SETUP_ESTIMATE_S = {"cpu": 0.4, "cuda": 5.0}
WORKER_START_ESTIMATE_S = 5.0
MIN_TIME_PART = 10  # of the time limit: clocks need some time to rise, whatever the first samples say

_LISTS = ("providers", "seq_lens", "head_dims", "chunk_sizes", "dtypes", "modes", "regimes")


@dataclass(frozen=True)
class SweepSpec:
    """Everything that decides what a sweep measures and how. Every combination of the lists is measured.

    Args:
        name: of the sweep, for people.
        providers: names of providers.
        seq_lens: tokens a sequence.
        head_dims: pairs (head_dim_k, head_dim_v).
        chunk_sizes: for the providers that have chunks; the others are measured once.
        dtypes: of "float32", "float16", "bfloat16".
        modes: of `results.MODES`.
        regimes: of `results.REGIMES`; on a CPU "eager" only.
        batch, heads, value_heads: as in `Workload`.
        device: "cpu", "cuda" or "cuda:N".
        gates: name of the gate profile.
        seed: of the timed inputs; the check uses the next one.
        precision: sampling stops when half of the 95 % confidence interval of the median is within this part of it.
        min_time_s: a point is sampled for at least so many seconds, precise or not; None means a tenth of the limit.
        time_limit_s: sampling of a point stops after so many seconds, precise or not, but not before 6 samples, which
            an interval needs; 3 where one call alone takes longer than this.
        setup_limit_s: a point may take so long to build, run once and be checked; None means 120 s on a CPU and 600 s
            on a GPU.
        run_limit_s: a block of samples may take so much longer than planned before it is ended.
        memory_limit_bytes: host memory of the worker process; None means 85 % of what is available at the start.

    Raises:
        ValueError: naming the argument, its value and what it may be.
    """

    name: str
    providers: tuple[str, ...]
    seq_lens: tuple[int, ...]
    head_dims: tuple[tuple[int, int], ...]
    chunk_sizes: tuple[int, ...] = (64,)
    dtypes: tuple[str, ...] = ("float32",)
    modes: tuple[str, ...] = ("forward", "forward_backward")
    regimes: tuple[str, ...] = ("eager",)
    batch: int = 1
    heads: int = 4
    value_heads: int | None = None
    device: str = "cpu"
    gates: str = "mild"
    seed: int = 0
    precision: float = 0.005
    min_time_s: float | None = None
    time_limit_s: float = 1.0
    setup_limit_s: float | None = None
    run_limit_s: float = 60.0
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in _LISTS:
            values = tuple(tuple(x) if isinstance(x, list) else x for x in getattr(self, name))
            if not values:
                raise ValueError(f"{name} is empty: name at least one")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        for name, known in (("modes", MODES), ("regimes", REGIMES)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(known)}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r} is unknown: choose cpu, cuda or cuda:N")
        for regime in self.regimes if self.device == "cpu" else ():
            if regime != "eager":
                raise ValueError(f"regimes={regime!r} needs a GPU: device='cpu' runs regime 'eager' only")
        for name in ("precision", "min_time_s", "time_limit_s", "setup_limit_s", "run_limit_s", "memory_limit_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be above 0")
        if self.min_time_s is not None and self.min_time_s > self.time_limit_s:
            raise ValueError(
                f"min_time_s={self.min_time_s!r} is above time_limit_s={self.time_limit_s!r}: raise the limit"
            )

    @property
    def device_kind(self) -> str:
        """The device without its number: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    @property
    def min_seconds(self) -> float:
        """`min_time_s`, or its default."""
        return self.time_limit_s / MIN_TIME_PART if self.min_time_s is None else self.min_time_s

    @property
    def setup_seconds(self) -> float:
        """`setup_limit_s`, or the default of the device."""
        return SETUP_LIMIT_S[self.device_kind] if self.setup_limit_s is None else self.setup_limit_s

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return asdict(self)


def plan(spec: SweepSpec) -> list[Point]:
    """The points of a sweep in the order in which they are measured: workload by workload, its providers side by side.

    Whether a provider can run its points is found out by the sweep; those it cannot run are rows too.

    Raises:
        ValueError: for an unknown provider, gate profile, dtype or a bad size.
    """
    from mdnbench.baselines.inputs import get_gate_profile
    from mdnbench.baselines.registry import get_provider

    get_gate_profile(spec.gates)
    chunk_sizes = {
        name: (None,) if get_provider(name).chunk_sizes is None else spec.chunk_sizes for name in spec.providers
    }
    return [
        Point(provider, _workload(spec, dtype, head_dims, seq_len, chunk_size), mode, regime)
        for dtype in spec.dtypes
        for head_dims in spec.head_dims
        for seq_len in spec.seq_lens
        for regime in spec.regimes
        for mode in spec.modes
        for provider in spec.providers
        for chunk_size in chunk_sizes[provider]
    ]


def providers_of(names: Sequence[str]) -> dict[str, Provider]:
    """The providers of these names, by name."""
    from mdnbench.baselines.registry import get_provider

    return {name: get_provider(name) for name in names}


def providers_alone(names: Sequence[str]) -> set[str]:
    """Those of the providers that need a process of their own, to build what is installed."""
    found = providers_of(names).items()
    return {name for name, provider in found if not provider.shares_process and provider.missing() is None}


def estimate_seconds(points: Sequence[Point], spec: SweepSpec) -> float:
    """How long the points may take: the time limit of each, what set-up usually takes, and one start of the worker.

    An estimate, not a bound: points that are precise early take less, and first calls that autotune take minutes more.
    """
    if not points:
        return 0.0
    return WORKER_START_ESTIMATE_S + len(points) * (spec.time_limit_s + SETUP_ESTIMATE_S[spec.device_kind])


def first_difference(
    before: dict[str, Any], now: dict[str, Any], passed_over: Sequence[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first field whose values differ, with both values; fields `passed_over` do not count. None when equal."""
    for name in [*now, *(name for name in before if name not in now)]:
        if name not in passed_over and before.get(name) != now.get(name):
            return name, before.get(name), now.get(name)
    return None


def _workload(
    spec: SweepSpec, dtype: str, head_dims: tuple[int, int], seq_len: int, chunk_size: int | None
) -> Workload:
    return Workload(
        seq_len=seq_len,
        head_dim_k=head_dims[0],
        head_dim_v=head_dims[1],
        batch=spec.batch,
        heads=spec.heads,
        value_heads=spec.value_heads,
        chunk_size=chunk_size,
        dtype=dtype,
        device=spec.device_kind,
        gates=spec.gates,
    )
