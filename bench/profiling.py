"""Where the time of a call goes: kernels, launches, gaps and allocations, from a trace of torch.profiler.

The numbers are read from the Chrome trace that is saved, so that what is shown can be looked up there. Importing this
loads no torch, recording does.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdnbench.baselines.provider import Provider
    from mdnbench.baselines.workload import Workload

WARM_UP_CALLS = 3
IDLE = "idle"  # the stage of the time in which nothing runs
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")

# Stages by the names of kernels (on a GPU) and operators (on a CPU), the first that fits. Those of chunked linear
# attention come first: what goes from chunk to chunk, and what the tokens of one chunk need of one another.
STAGES: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|sdpa|dot_product_attention|_attn"),
    ("outputs", r"chunk_scan|kernel_o\b|kernel_o_|bwd_kernel_d(qk|v)"),
    ("across chunks", r"kernel_d?h|chunk_state|state_passing|states_bwd|\bscan_(fwd|bwd)|recurrent"),
    ("within chunks", r"prepare|kkt|inverse|solve|tril|recompute|intra|wy_|bmm_chunk|(matrices|gradients)_bwd"),
    ("gates and sums", r"\bgates?_|_gate_|cumsum|cumprod|softplus|log_?sigmoid"),
    ("normalise q, k", r"l2norm|normalize|rms_?norm|linalg_vector_norm"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|wgmma|matmul|::(mm|bmm|addmm|baddbmm|linear|einsum|dot)\b"),
    ("copies", r"memcpy|memset|copy|contiguous|::cat\b|catarray|fill|clone|transpose|permute|::to\b|empty|zero|ones"),
    (
        "elementwise and sums",
        r"elementwise|vectorized|reduce|pointwise|triton_(poi|red|per)|softmax|"
        r"::(mul|add|sub|rsub|div|exp|log|neg|sum|pow|where|all|any|isneginf|flip|addcmul|sigmoid|square|sqrt|rsqrt)_?\b",
    ),
    ("autograd", r"(?-i:^autograd::|^_?[A-Z]\w+$)"),  # its own work, and that of Python functions with a backward
)
OTHER = "other"


@dataclass(frozen=True)
class Kernel:
    """One kernel (GPU) or operator (CPU) in the average call: its stage, launches, and time in itself alone."""

    name: str
    stage: str
    launches: float
    ms: float


@dataclass(frozen=True)
class Profile:
    """The average call of one provider.

    Attributes:
        provider, mode: what was called.
        workload: fields of the workload.
        device: "cpu" or "cuda".
        calls: how many were recorded.
        span_ms: from the first start to the last end, a call.
        busy_ms: of these, in which at least one kernel or operator ran.
        idle_ms: the rest: gaps between kernels on a GPU, time outside of operators on a CPU.
        launches: kernels, copies and fills on a GPU, operators without others inside on a CPU, a call.
        allocated_bytes: what PyTorch allocated in a call, all of it together, released or not.
        kernels: by time, the longest first.
        stages: ms by stage, `IDLE` included.
    """

    provider: str
    mode: str
    workload: Mapping[str, Any]
    device: str
    calls: int
    span_ms: float
    busy_ms: float
    idle_ms: float
    launches: float
    allocated_bytes: float
    kernels: tuple[Kernel, ...]
    stages: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON and for reports."""
        return asdict(self)


def record(provider: Provider, workload: Workload, mode: str, device: str, calls: int, trace_file: Path) -> Profile:
    """Run a provider under torch.profiler and save the Chrome trace.

    Args:
        provider: it must support the workload.
        workload, mode: what is called, with the inputs of seed 0.
        device: "cpu", "cuda" or "cuda:N".
        calls: how many are recorded, after WARM_UP_CALLS that are not.
        trace_file: ends in .json.gz; chrome://tracing and Perfetto open it.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from mdnbench.baselines.inputs import make_inputs

    from . import measure

    place = measure.use_device(device)
    on_gpu = place.type == "cuda"
    synchronise = torch.cuda.synchronize if on_gpu else (lambda: None)
    inputs, d_output = make_inputs(provider.operator, workload, 0, place, requires_grad=mode != "forward")
    build = measure.returning_tensor(provider.build(workload, inputs), provider.name)
    call = measure.open_call(build, mode, list(inputs.values()), d_output)
    for _ in range(WARM_UP_CALLS):
        call()
    synchronise()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(calls):
            call()
        synchronise()
    profiler.export_chrome_trace(str(trace_file))
    with gzip.open(trace_file, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    return read_trace(trace, provider.name, mode, workload.to_dict(), calls)


def read_trace(trace: Mapping[str, Any], provider: str, mode: str, workload: Mapping[str, Any], calls: int) -> Profile:
    """The average call in a Chrome trace of `calls` calls.

    Raises:
        ValueError: when nothing ran on the device.
    """
    on_gpu = workload["device"] == "cuda"
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    if on_gpu:
        runs = [(it["name"], it["ts"], it["dur"]) for it in events if it.get("cat") in GPU_CATEGORIES]
        inside = [(name, duration) for name, _, duration in runs]
    else:
        operators = [event for event in events if event.get("cat") == "cpu_op"]
        runs = [(it["name"], it["ts"], it["dur"]) for it in operators]
        inside = _own_times(operators)
    if not runs:
        raise ValueError(f"{provider}: the trace holds nothing that ran on {workload['device']}")
    span = max(start + duration for _, start, duration in runs) - min(start for _, start, _ in runs)
    busy = _union((start, start + duration) for _, start, duration in runs)
    times: dict[str, list[float]] = defaultdict(list)
    for name, duration in inside:
        times[name].append(duration)
    kernels = [
        Kernel(name, stage_of(name), len(found) / calls, sum(found) / calls / 1e3) for name, found in times.items()
    ]
    kernels.sort(key=lambda kernel: -kernel.ms)
    # Kernels on several streams may overlap: the stages are scaled to the time in which any ran.
    total = sum(kernel.ms for kernel in kernels)
    scale = busy / calls / 1e3 / total if total else 0.0
    stages: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        stages[kernel.stage] += kernel.ms * scale
    stages[IDLE] = (span - busy) / calls / 1e3
    return Profile(
        provider=provider,
        mode=mode,
        workload=dict(workload),
        device=workload["device"],
        calls=calls,
        span_ms=span / calls / 1e3,
        busy_ms=busy / calls / 1e3,
        idle_ms=(span - busy) / calls / 1e3,
        launches=len(inside) / calls,
        allocated_bytes=_allocated(trace["traceEvents"], 1 if on_gpu else 0) / calls,
        kernels=tuple(kernels),
        stages=dict(sorted(stages.items(), key=lambda item: -item[1])),
    )


def stage_of(name: str) -> str:
    """The stage of a kernel or operator by its name; OTHER where no pattern fits."""
    return next((stage for stage, pattern in STAGES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def _own_times(operators: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Name and duration of each operator less that of the operators inside of it; those that are all inside are left
    out."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in operators:
        threads[event.get("tid")].append(event)
    found = []
    for events in threads.values():
        stack: list[list[Any]] = []  # [event, time of those inside]

        def close(stack: list[list[Any]] = stack) -> None:
            event, children = stack.pop()
            own = event["dur"] - children
            if own > 0:
                found.append((event["name"], own))
            if stack:
                stack[-1][1] += event["dur"]

        for event in sorted(events, key=lambda it: (it["ts"], -it["dur"])):
            while stack and event["ts"] >= stack[-1][0]["ts"] + stack[-1][0]["dur"]:
                close()
            stack.append([event, 0.0])
        while stack:
            close()
    return found


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals cover together."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _allocated(events: Sequence[Mapping[str, Any]], device_type: int) -> float:
    """Bytes of all allocations on the device: 0 is the CPU, 1 CUDA, as in c10::DeviceType."""
    arguments = (event.get("args", {}) for event in events if event.get("name") == "[memory]")
    return sum(max(0, it.get("Bytes", 0)) for it in arguments if it.get("Device Type") == device_type)
