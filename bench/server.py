"""What the worker process does with a request: build, check or time a point. A fault becomes a status."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdnbench.baselines.inputs import make_inputs, refused_gates
from mdnbench.baselines.provider import Inputs, Operator, Provider
from mdnbench.baselines.registry import providers

from . import correctness, measure, memory
from .requests import Block, Check, Failure, PointFailed, Prepare, Prepared
from .results import Point

_CPU_OUT_OF_MEMORY = "can't allocate memory"  # in the RuntimeError of PyTorch's CPU allocator
_LONGEST_MESSAGE = 300


class Server:
    """Holds what is built of the present group of points: those that share all but provider and chunk size.

    Graphs, and the forward pass that mode "backward" starts from, are made for each block and released after it, so
    that one point's memory is not taken from another's.
    """

    def __init__(self, device: str, tell_phase: Callable[[str], None]) -> None:
        self.tell_phase = tell_phase
        self.device = torch.device(device)
        self.providers = providers()
        self.time_calls = measure.time_on_cpu
        self.threads: int | None = torch.get_num_threads()
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)
            torch.cuda.set_device(self.device)
            self.time_calls = measure.time_on_cuda()
            self.threads = None
        self.group: object = None
        self.inputs: dict[Operator, tuple[Inputs, Tensor]] = {}
        self.built: dict[Point, _Built] = {}

    def answer(self, request: Prepare | Check | Block) -> Prepared | list[float] | Failure:
        """Carry out one request. A provider's fault is an answer, not an exception."""
        try:
            if isinstance(request, Prepare):
                return self.prepare(request)
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
        if provider.operator not in self.inputs:
            self.inputs[provider.operator] = make_inputs(
                provider.operator, point.workload, request.seed, self.device, requires_grad=point.mode != "forward"
            )
        inputs, d_output = self.inputs[provider.operator]
        self.tell_phase("the first call")
        start = time.perf_counter()
        built = _Built(provider.build(point.workload, inputs), list(inputs.values()), d_output, point.mode)
        # The first call alone is looked at, so that timed calls are the provider's and nothing else.
        replace(built, call=measure.returning_tensor(built.call, provider.name)).open()()
        self._synchronise()
        first_call_s = time.perf_counter() - start
        if self.device.type == "cuda":
            self.tell_phase("the calls after the first")
            measure.call_until_settled(built.open(), first_call_s, self._synchronise)
        found = Prepared(first_call_s=first_call_s, threads=self.threads)
        if request.full:
            found = replace(self._checked(provider, request), first_call_s=first_call_s)
            self.tell_phase("the measurement of memory")
            found = replace(
                found,
                peak_memory_bytes=memory.peak_memory_bytes(built.open, built.tensors, self.device),
                saved_memory_bytes=(
                    None if point.mode == "forward" else memory.saved_memory_bytes(built.call, built.leaves)
                ),
            )
        self.built[point] = built
        return found

    def check(self, request: Check) -> Prepared:
        """Check the point and nothing else."""
        self.tell_phase("set-up")
        return self._checked(self._provider(request.point), request)

    def block(self, request: Block) -> list[float]:
        """Samples of a point in ms; it must have been prepared."""
        self.tell_phase("the timed calls")
        built = self.built[request.point]
        if request.point.regime == "eager":
            return measure.take_block(self.time_calls, built.open(), request.max_seconds, request.max_samples)
        replay = measure.open_graph(built.call, built.mode, built.leaves, built.d_output)
        samples = measure.take_block(self.time_calls, replay, request.max_seconds, request.max_samples)
        del replay
        torch.cuda.empty_cache()  # the memory of a graph stays reserved for it until it is released so
        return samples

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
        if reason is None and point.regime == "graph" and not provider.cuda_graph:
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
        lines = str(fault).strip().splitlines() or [""]
        message = f"{type(fault).__name__}: {lines[0]}"[:_LONGEST_MESSAGE].rstrip(": ")
        if isinstance(fault, (torch.OutOfMemoryError, MemoryError)) or _CPU_OUT_OF_MEMORY in str(fault):
            return Failure("out_of_memory", message, healthy=False)
        if isinstance(fault, measure.CaptureError):
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
