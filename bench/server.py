"""What the worker process does with a request: build, check, time or profile a point. A fault becomes a status."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.text import Text
from torch import Tensor

from mdnbench.baselines.inputs import make_inputs, refused_gates
from mdnbench.baselines.provider import Inputs, Operator, Provider
from mdnbench.baselines.registry import providers

from . import correctness, measure, memory, profiling
from .requests import TIMED_CALLS, Block, Check, Failure, PointFailed, Prepare, Prepared, Trace
from .results import Point

_ILLEGAL_ACCESS = "illegal memory access"  # a fault of the kernel, captured or not
_CPU_OUT_OF_MEMORY = "can't allocate memory"  # in the RuntimeError of PyTorch's CPU allocator
_LONGEST_MESSAGE = 300

INPUT_SETS = 2  # taken in turn where the cache is cold, so that no call gains by what the call before it read
_ROOM_OF_A_SET = 64  # a further set is made where so many would fit: a call keeps many times its inputs for backward


class Server:
    """Holds what is built of the present group of points: those that share all but provider and chunk size.

    Graphs, and the forward pass that mode "backward" starts from, are made for each block and released after it, so
    that one point's memory is not taken from another's.
    """

    def __init__(self, device: str, tell_phase: Callable[[str], None]) -> None:
        self.tell_phase = tell_phase
        self.device = measure.use_device(device)
        self.providers = providers()
        self.time_calls = {"warm": measure.time_on_cpu}
        self.threads: int | None = torch.get_num_threads()
        if self.device.type == "cuda":
            self.time_calls = {"cold": measure.time_on_cuda(), "warm": measure.time_on_cuda(cold=False)}
            self.threads = None
        self.group: object = None
        self.inputs: dict[Operator, list[tuple[Inputs, Tensor]]] = {}
        self.built: dict[Point, list[_Built]] = {}

    def answer(self, request: Prepare | Check | Block | Trace) -> Prepared | list[float] | profiling.Profile | Failure:
        """Carry out one request. A provider's fault is an answer, not an exception."""
        try:
            if isinstance(request, Prepare):
                return self.prepare(request)
            if isinstance(request, Trace):
                return self.trace(request)
            return self.check(request) if isinstance(request, Check) else self.block(request)
        except PointFailed as stop:
            failure = stop.failure
        except (Exception, SystemExit) as fault:  # a provider's: it becomes the status of its point
            failure = self._failure(fault)
        self.built.pop(request.point, None)
        gc.collect()  # the traceback held tensors
        return failure

    def prepare(self, request: Prepare) -> Prepared:
        """Build the point, call it for the first time and, when asked, check it and measure its memory."""
        point = request.point
        self.tell_phase("set-up")
        self._open_group(point)
        provider = self._provider(point)
        sets = self._input_sets(provider.operator, request)
        self.tell_phase("the first call")
        start = time.perf_counter()
        built = self._build(provider, point, *sets[0])
        # The first call alone is looked at, so that timed calls are the provider's and nothing else.
        replace(built, call=measure.returning_tensor(built.call, provider.name)).open()()
        self._synchronise()
        first_call_s = time.perf_counter() - start
        if self.device.type == "cuda":
            self.tell_phase("the calls after the first")
            measure.call_until_settled(built.open(), first_call_s, self._synchronise)
        found = Prepared(first_call_s=first_call_s, threads=self.threads, input_sets=len(sets))
        if request.full:
            found = replace(self._checked(provider, request), first_call_s=first_call_s, input_sets=len(sets))
            self.tell_phase("the measurement of memory")
            found = replace(
                found,
                peak_memory_bytes=memory.peak_memory_bytes(built.open, built.tensors, self.device),
                saved_memory_bytes=(
                    None if point.mode == "forward" else memory.saved_memory_bytes(built.call, built.leaves)
                ),
            )
        self.built[point] = [built, *(self._build(provider, point, *others) for others in sets[1:])]
        return found

    def check(self, request: Check) -> Prepared:
        """Check the point and nothing else."""
        self.tell_phase("set-up")
        return self._checked(self._provider(request.point), request)

    def block(self, request: Block) -> list[float]:
        """Samples of a point in ms; it must have been prepared."""
        self.tell_phase("the set-up of the timed calls")
        point, built = request.point, self.built[request.point]
        graph = point.launch == "graph"
        calls = [measure.open_graph(it.call, it.mode, it.leaves, it.d_output) if graph else it.open() for it in built]
        self.tell_phase(TIMED_CALLS)
        time_calls = self.time_calls[point.cache]
        samples = measure.take_block(time_calls, measure.in_turn(calls), request.max_seconds, request.max_samples)
        del calls
        if graph:
            torch.cuda.empty_cache()  # the memory of a graph stays reserved for it until it is released so
        return samples

    def trace(self, request: Trace) -> profiling.Profile:
        """Record calls of the point."""
        point = request.point
        provider = self._provider(point)
        self.tell_phase("the recording")
        return profiling.record(provider, point.workload, point.mode, str(self.device), request.calls, request.file)

    def _build(self, provider: Provider, point: Point, inputs: Inputs, d_output: Tensor) -> _Built:
        return _Built(provider.build(point.workload, inputs), list(inputs.values()), d_output, point.mode)

    def _input_sets(self, operator: Operator, request: Prepare) -> list[tuple[Inputs, Tensor]]:
        """The sets of inputs of a point: INPUT_SETS on a GPU with a cold cache where there is room, else one."""
        point = request.point
        if operator not in self.inputs:
            self.inputs[operator] = [self._make_inputs(operator, request, 0)]
            inputs, d_output = self.inputs[operator][0]
            room = self._free_bytes() // _ROOM_OF_A_SET
            if point.cache == "cold" and memory.bytes_of([*inputs.values(), d_output]) <= room:
                self.inputs[operator] += [self._make_inputs(operator, request, i) for i in range(1, INPUT_SETS)]
        return self.inputs[operator]

    def _make_inputs(self, operator: Operator, request: Prepare, index: int) -> tuple[Inputs, Tensor]:
        point = request.point
        seed = request.seed + 2 * index  # seed + 1 is that of the correctness check
        return make_inputs(operator, point.workload, seed, self.device, requires_grad=point.mode != "forward")

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def _open_group(self, point: Point) -> None:
        group = point.group
        if group != self.group:
            self.group = group
            self.built.clear()
            self.inputs.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _provider(self, point: Point) -> Provider:
        """The provider of a point that it supports."""
        provider = self.providers[point.provider]
        reason = provider.supports(point.workload, point.mode)
        if reason is None and point.launch == "graph" and not provider.cuda_graph:
            reason = "its calls cannot be captured in a CUDA graph"
        if reason is None:
            reason = refused_gates(provider.operator, point.workload.gates)
        if reason is not None:
            raise PointFailed(Failure("unsupported", reason))
        return provider

    def _checked(self, provider: Provider, request: Prepare | Check) -> Prepared:
        self.tell_phase("the correctness check")
        point = request.point
        check = correctness.check(provider, point.workload, point.mode, request.seed, self.device)
        notes = tuple(provider.notes(point.workload, point.mode))
        found = Prepared(check.relative_error, check.checked_seq_len, threads=self.threads, notes=notes)
        if check.reason is not None:
            raise PointFailed(Failure("incorrect", "; ".join([check.reason, *notes]), found=found))
        return found

    def _failure(self, fault: BaseException) -> Failure:
        lines = Text.from_ansi(str(fault).strip()).plain.splitlines() or [""]  # some compilers colour their errors
        message = f"{type(fault).__name__}: {lines[0]}"[:_LONGEST_MESSAGE].rstrip(": ")
        if isinstance(fault, (torch.OutOfMemoryError, MemoryError)) or _CPU_OUT_OF_MEMORY in str(fault):
            return Failure("out_of_memory", message, healthy=False)
        if isinstance(fault, measure.CaptureError) and _ILLEGAL_ACCESS not in str(fault):
            return Failure("unsupported", f"the capture in a CUDA graph failed: {lines[0]}", healthy=False)
        return Failure("error", message, healthy=self._device_answers())

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _device_answers(self) -> bool:
        """False after a fault that stays with the CUDA context, such as an illegal memory access."""
        try:
            self._synchronise()
        except RuntimeError:
            return False
        return True


@dataclass
class _Built:
    """A provider's call on its inputs."""

    call: Callable[[], Tensor]
    leaves: list[Tensor]
    d_output: Tensor
    mode: str

    @property
    def tensors(self) -> list[Tensor]:
        """What exists before a call in this mode."""
        return self.leaves if self.mode == "forward" else [*self.leaves, self.d_output]

    def open(self) -> measure.Call:
        return measure.open_call(self.call, self.mode, self.leaves, self.d_output)
