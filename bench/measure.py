"""Times one call again and again, on a CPU or a CUDA device. Runs in the worker process.

Modes:
    forward           the call under `torch.no_grad()`, as in inference: nothing is kept for a backward pass.
    backward          gradients of every input, from a forward pass that ran once, outside of the timing.
    forward_backward  both, as in one step of training.

Regimes: "eager" launches every call from Python; "graph" replays a CUDA graph, which leaves the host out. On CUDA both
empty the L2 cache before each call, because in a model the call finds its inputs in memory, and take sets of inputs in
turn; "eager-warm" and "graph-warm" do neither: inputs that fit into the cache stay there.

On a CPU a sample is the wall time of one call. On CUDA it is the time between two events around the call.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]
TimeCalls = Callable[[Call, int], list[float]]  # (call, how many times) -> milliseconds of each

L2_SIZES_FLUSHED = 2
GRAPH_WARM_UP_CALLS = 3
CALLS_PER_SYNCHRONISATION = 8
MAX_SETTLING_CALLS = 6
SETTLED = 0.97  # warm-up ends when a call takes at least this part of the call before


class CaptureError(RuntimeError):
    """A call could not be captured in a CUDA graph. The CUDA state of the process is not to be trusted after it."""


def use_device(name: str) -> torch.device:
    """The device called `name`, with its number if it is a GPU, which becomes the current one: "cuda" is the first."""
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def returning_tensor(call: Callable[[], object], provider: str) -> Callable[[], Tensor]:
    """`call`, which raises a TypeError that names the provider when it returns anything but one tensor."""

    def checked() -> Tensor:
        output = call()
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{provider} returned a {type(output).__name__} where the output tensor is due: what build() returns "
                f"must return o alone"
            )
        return output

    return checked


def call_until_settled(call: Call, first_call_s: float, synchronise: Callable[[], None]) -> None:
    """The calls after the first, until one takes at least half as long as the one before.

    A compiler or an autotuner that is not done with the first call is done then, and is in no sample.

    Args:
        call: what will be timed.
        first_call_s: how long its first call took.
        synchronise: waits until the device has done what was launched.
    """
    before = first_call_s
    for _ in range(MAX_SETTLING_CALLS):
        start = time.perf_counter()
        call()
        synchronise()
        took = time.perf_counter() - start
        if took > before / 2:
            return
        before = took


def open_call(call: Callable[[], Tensor], mode: str, inputs: Sequence[Tensor], d_output: Tensor) -> Call:
    """The function whose calls are timed in `mode`; for "backward" this runs the forward pass.

    Args:
        call: computes the output [B, T, HV, V] from `inputs`.
        mode: one of `results.MODES`.
        inputs: leaves; with requires_grad in the modes that have a backward.
        d_output: gradient that arrives at the output, of its shape.

    Returns:
        A function that returns the output in forward mode, else the gradients in the order of `inputs`, None for an
        input that the output does not depend on.
    """
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return call()

        return forward
    if mode == "backward":
        output = call()
        return lambda: torch.autograd.grad(output, inputs, d_output, retain_graph=True, allow_unused=True)
    return lambda: torch.autograd.grad(call(), inputs, d_output, allow_unused=True)


def open_graph(call: Callable[[], Tensor], mode: str, inputs: Sequence[Tensor], d_output: Tensor) -> Call:
    """As `open_call`, captured in a CUDA graph: the returned function replays it.

    Raises:
        CaptureError: when the capture fails.
        torch.OutOfMemoryError: when memory is short.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a forward pass on this stream makes its backward run there too
        timed = open_call(call, mode, inputs, d_output)
        for _ in range(GRAPH_WARM_UP_CALLS):
            timed()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = timed()
        graph.replay()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:  # of the GPU's memory, and not of the capture
        raise
    except Exception as fault:
        raise CaptureError(f"{type(fault).__name__}: {fault}") from fault

    def replay() -> object:
        graph.replay()
        return timed, result  # the graph reads and writes the memory these hold

    return replay


def in_turn(calls: Sequence[Call]) -> Call:
    """A function that runs one of `calls` each time, in turn."""
    if len(calls) == 1:
        return calls[0]
    following = itertools.cycle(calls)
    return lambda: next(following)()


def time_on_cpu(call: Call, count: int) -> list[float]:
    """Wall time of each of `count` calls in ms."""
    samples = []
    for _ in range(count):
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) / 1e6)
    return samples


def time_on_cuda(cold: bool = True) -> TimeCalls:
    """A function as `time_on_cpu`, by CUDA events; with `cold`, the L2 cache of the current device is emptied before
    each call by writing twice its size."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(L2_SIZES_FLUSHED * l2_bytes if cold else 0, dtype=torch.int8, device="cuda")

    def time_calls(call: Call, count: int) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in pairs:
            if cold:
                flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [round(start.elapsed_time(end), 6) for start, end in pairs]  # events resolve 5e-4 ms at best

    return time_calls


def take_block(time_calls: TimeCalls, call: Call, max_seconds: float, max_samples: int) -> list[float]:
    """Samples of `call` in ms, in the order taken, after a warm-up; at least one.

    The warm-up ends when calls get no faster, at the latest after a quarter of the time. A call that takes longer than
    this quarter is a sample at once: a cold start is small against it, and a second call would cost as much again.
    """
    start = time.perf_counter()
    quarter = max_seconds / 4
    samples = time_calls(call, 1)
    latest = samples[0]
    if latest / 1e3 < quarter:
        samples = []
        settled = False
        while not settled and time.perf_counter() - start < quarter:
            before, latest = latest, time_calls(call, 1)[0]
            settled = latest > SETTLED * before
    at_once = CALLS_PER_SYNCHRONISATION if CALLS_PER_SYNCHRONISATION * latest / 1e3 < quarter else 1
    while not samples or (len(samples) < max_samples and time.perf_counter() - start < max_seconds):
        samples += time_calls(call, min(at_once, max_samples - len(samples)))
    return samples
