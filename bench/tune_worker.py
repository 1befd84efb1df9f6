"""The processes of the tuner: one candidate at a time is compiled, checked or timed in one that may die of it.

`TuneWorker` is the side of the tuner; the other side, `main`, loads torch only in that process.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import worker_process
from .requests import TIMED_CALLS, Failure, Phase, PointFailed
from .worker import MEMORY_LIMIT_FRACTION, START_LIMIT_S, Worker, _interrupt_held, available_memory_bytes

if TYPE_CHECKING:
    from .tune_interface import Tunable
    from .tune_log import Candidate

_LONGEST_MESSAGE = 300
# What a fault in each kind of work makes of the candidate; "timeout" stays.
_STATUS = {"compile": "compile_error", "check": "crashed", "sample": "crashed"}


@dataclass(frozen=True)
class Request:
    """Work on one candidate: "compile", "check" or "sample" (times in ms)."""

    work: str
    tunable: Tunable
    candidate: Candidate
    max_seconds: float = 0.0
    max_samples: int = 0
    keep: bool = False  # what is opened for the timed calls, for further blocks


class TuneWorker(Worker):
    """A process for candidates. It is started without waiting for it, so that one can stand by.

    Args:
        tunable: what is tuned first: the process imports its module before the first request.
        log_path: what is printed there is appended to this file.
        variables: of the environment of the process; None takes one away.
        runs: whether candidates run there: only then it warms up, which may take memory of a GPU.
    """

    def __init__(
        self, tunable: Tunable, log_path: str | Path, variables: Mapping[str, str | None], runs: bool = True
    ) -> None:
        self.memory_limit_bytes = int(MEMORY_LIMIT_FRACTION * available_memory_bytes())
        self.alive = True
        self.took_s = 0.0  # of the last request
        self._ready = False
        self._log_path = Path(log_path)
        self._highest_bytes = 0
        self._phase = "start-up"
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # As bytes: read after the variables are set, which Triton reads when it is imported.
        arguments = (theirs, str(log_path), os.getpid(), dict(variables), pickle.dumps(tunable), runs)
        self._process = context.Process(target=main, args=arguments, name="mdnbench tuning", daemon=True)
        with _interrupt_held():
            self._process.start()
        theirs.close()

    def running(self) -> bool:
        """Whether the process is there: one that waits may have been ended by the system."""
        return self._process.is_alive()

    def ask(self, request: Request, limit_s: float) -> Any:
        """The answer to a request.

        Raises:
            PointFailed: with the status of the candidate: "compile_error", "pruned", "crashed" or "timeout".
            RuntimeError: when the process does not come up.
        """
        if not self._ready:
            try:
                self._await(START_LIMIT_S, "start-up")
            except PointFailed as stop:
                raise RuntimeError(f"the process for candidates did not start: {stop.failure.reason}") from None
            self._ready = True
        names = {"compile": "compiling", "check": "the check", "sample": "one block of samples"}
        start = time.monotonic()
        try:
            return self._ask(request, limit_s, names[request.work])
        except PointFailed as stop:
            failure = stop.failure
            if failure.status in ("crashed", "out_of_memory"):
                failure = Failure(_STATUS[request.work], failure.reason, failure.healthy)
            raise PointFailed(failure) from None
        finally:
            self.took_s = time.monotonic() - start

    def kill(self) -> None:
        """End the process, from whichever thread: the one that waits for its answer sees it die."""
        self._process.kill()


def main(
    connection: Connection,
    log_path: str,
    parent_pid: int,
    variables: Mapping[str, str | None],
    tunable: bytes,
    runs: bool,
) -> None:
    """Answer requests until the parent closes its end or dies. Arguments as of `TuneWorker`."""
    worker_process._settle_in(log_path, parent_pid)
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        first: Tunable = pickle.loads(tunable)  # imports its module
        if runs:
            first.warm_up()
        worker_process.freeze_what_is_loaded()
        server = _Server(lambda phase: connection.send(Phase(phase)))
        connection.send(worker_process.READY)
        while True:
            connection.send(server.answer(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # nothing that a candidate left (threads, exit handlers) may keep this process


class _Server:
    """Carries out requests; keeps the calls it has opened, so that finalists are timed in alternation."""

    def __init__(self, tell_phase: Callable[[str], None]) -> None:
        self.tell_phase = tell_phase
        self.tunable: Tunable | None = None
        self.calls: dict[str, Callable[[], object]] = {}
        self.time_calls: Any = None

    def answer(self, request: Request) -> Any:
        try:
            return getattr(self, f"_{request.work}")(request)
        except (Exception, SystemExit) as fault:  # a candidate's: it becomes its status
            message = f"{type(fault).__name__}: {_gist(str(fault))}"[:_LONGEST_MESSAGE].rstrip(": ")
            failure = Failure(_STATUS[request.work], message, healthy=_device_answers())
            if type(fault).__name__ == "OutOfResources":  # Triton's, when the GPU cannot hold a program
                failure = Failure("pruned", message)
        self.calls.pop(_name(request), None)
        gc.collect()  # the traceback held tensors
        return failure

    def _compile(self, request: Request) -> Any:
        self.tell_phase("compiling")
        return request.tunable.compile(request.candidate)

    def _check(self, request: Request) -> str | None:
        self.tell_phase("the check")
        return request.tunable.check(request.candidate)

    def _sample(self, request: Request) -> list[float]:
        from . import measure

        self.tell_phase("the set-up of the timed calls")
        if request.tunable != self.tunable:  # what the former kept open takes memory
            self._release(request.tunable)
            self.tunable, self.time_calls = request.tunable, None
            on_gpu = request.tunable.device.startswith("cuda")
            self.time_calls = measure.time_on_cuda() if on_gpu else measure.time_on_cpu
        name = _name(request)
        call = self.calls.get(name) or request.tunable.run(request.candidate)
        if request.keep:
            self.calls[name] = call
        self.tell_phase(TIMED_CALLS)
        samples = measure.take_block(self.time_calls, call, request.max_seconds, request.max_samples)
        del call
        if not request.keep:
            self._release(request.tunable, of_all=False)
        return samples

    def _release(self, tunable: Tunable, of_all: bool = True) -> None:
        """Give back the memory of what is not kept open; `of_all`: keep nothing."""
        if of_all:
            self.calls.clear()
        if tunable.device.startswith("cuda"):
            gc.collect()
            sys.modules["torch"].cuda.empty_cache()  # the memory of a graph stays reserved for it until then


def _gist(message: str) -> str:
    """The first line, and the one that says what is wrong: ptxas marks it; in other messages it is the last."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    marked = [line for line in lines[1:] if re.search(r"\b(fatal|error)\b *:", line)]
    return " ... ".join(dict.fromkeys(lines[:1] + (marked[:1] or lines[-1:])))


def _name(request: Request) -> str:
    return f"{request.tunable.name} {json.dumps(request.candidate, sort_keys=True)}"


def _device_answers() -> bool:
    """False after a fault that stays with the CUDA context, such as an illegal memory access."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
