"""The parent's side of the worker process: sends requests, keeps the limits, and names what ended the process."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from . import worker_process
from .requests import TIMED_CALLS, Block, Check, Failure, Phase, PointFailed, Prepare, Prepared, Trace
from .results import Point

if TYPE_CHECKING:
    from .profiling import Profile

POLL_S = 0.03
START_LIMIT_S = 180.0
STOP_LIMIT_S = 10.0
MEMORY_LIMIT_FRACTION = 0.85

_CGROUP_FILES = (  # limit, use, and the name of the reclaimable part in memory.stat: cgroup versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


class Worker:
    """A process that answers requests about points, one at a time; a fault of a provider ends it at worst.

    The process is started by "spawn", so that it has this one's environment and import paths and nothing else of it.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        log_path: what providers print is appended to this file.
        memory_limit_bytes: the process may hold so much host memory; None means 85 % of what is available now.

    Raises:
        RuntimeError: when the process does not come up.
    """

    def __init__(self, device: str, log_path: str | Path, memory_limit_bytes: int | None = None) -> None:
        if memory_limit_bytes is None:
            memory_limit_bytes = int(MEMORY_LIMIT_FRACTION * available_memory_bytes())
        self.memory_limit_bytes = memory_limit_bytes
        self.alive = True
        self.prepared: set[Point] = set()
        self._log_path = Path(log_path)
        self._highest_bytes = 0
        self._phase = "start-up"
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=worker_process.main,
            args=(theirs, device, str(log_path), os.getpid()),
            name="mdnbench worker",
            daemon=True,
        )
        with _interrupt_held():
            self._process.start()
        theirs.close()
        try:
            self._await(START_LIMIT_S, "start-up")
        except PointFailed as stop:
            raise RuntimeError(f"the worker process did not start: {stop.failure.reason}") from None
        except KeyboardInterrupt:
            self.stop()
            raise

    def prepare(self, request: Prepare, limit_s: float) -> Prepared:
        """Build a point, call it once and check it.

        Raises:
            PointFailed: with the status that the point gets instead of a speed. `alive` says whether this worker is
                still good for other points.
        """
        found = self._ask(request, limit_s, "set-up: build, first call and check")
        self.prepared.add(request.point)
        return found

    def check(self, request: Check, limit_s: float) -> Prepared:
        """Check a point. Raises as `prepare`."""
        return self._ask(request, limit_s, "check")

    def block(self, request: Block, limit_s: float, watch: Callable[[], float] | None = None) -> list[float]:
        """Samples in ms of a point that this worker has prepared. Raises as `prepare`.

        `watch` is called again and again, in this process, while samples are taken: at least once within the seconds
        that it returned.
        """
        return self._ask(request, limit_s, "one block of samples", watch)

    def trace(self, request: Trace, limit_s: float) -> Profile:
        """Record calls of a point. Raises as `prepare`."""
        return self._ask(request, limit_s, "the recording")

    def stop(self) -> None:
        """End the process at once."""
        self.alive = False
        self._process.kill()
        self._process.join(timeout=STOP_LIMIT_S)  # a process that waits for a driver cannot be killed
        self._connection.close()

    def _ask(self, request: Any, limit_s: float, work: str, watch: Callable[[], float] | None = None) -> Any:
        self._phase = work  # until it says more: the last phase was of the request before
        try:
            self._connection.send(request)
        except OSError:
            raise self._died() from None
        answer = self._await(limit_s, work, watch)
        if not isinstance(answer, Failure):
            return answer
        if not answer.healthy:
            self.stop()
        raise PointFailed(answer)

    def _await(self, limit_s: float, work: str, watch: Callable[[], float] | None = None) -> Any:
        """The next answer; PointFailed when the process ends, or goes beyond a limit and is ended."""
        deadline = time.monotonic() + limit_s
        process = None
        pause = POLL_S
        while True:
            multiprocessing.connection.wait([self._connection, self._process.sentinel], timeout=pause)
            try:
                while self._connection.poll():
                    answer = self._connection.recv()
                    if not isinstance(answer, Phase) or answer == worker_process.READY:
                        return answer
                    self._phase = answer.name
            except (EOFError, OSError):
                raise self._died() from None
            if not self._process.is_alive():
                raise self._died()
            if watch is not None and self._phase == TIMED_CALLS:
                pause = min(POLL_S, watch())
            with contextlib.suppress(psutil.Error):  # it ended just now
                process = process or psutil.Process(self._process.pid)
                used = process.memory_info().rss
                self._highest_bytes = max(self._highest_bytes, used)
                if used > self.memory_limit_bytes:
                    raise self._ended("out_of_memory", f"held more than {_gib(self.memory_limit_bytes)}")
            if time.monotonic() > deadline:
                raise self._ended("timeout", f"took longer than the limit of {limit_s:g} s for {work}")

    def _ended(self, status: str, reason: str) -> PointFailed:
        self.stop()
        return PointFailed(Failure(status, f"{reason}; it was ended during {self._phase}", healthy=False))

    def _died(self) -> PointFailed:
        self._process.join(timeout=5)  # the pipe closes before the exit code is known
        code = self._process.exitcode
        self.stop()
        how = f"the process ended with exit code {code}"
        status = "crashed"
        if code is not None and code < 0:
            try:
                how = f"the process was killed by {signal.Signals(-code).name}"
            except ValueError:  # a real-time signal has no name
                how = f"the process was killed by signal {-code}"
            if -code == signal.SIGKILL and self._highest_bytes > self.memory_limit_bytes / 2:
                status, how = "out_of_memory", f"{how} while it held {_gib(self._highest_bytes)}"
        return PointFailed(Failure(status, f"{how} during {self._phase}; see {self._log_path.name}", healthy=False))


class Workers:
    """The worker processes of a run: one for all providers but those of `alone`, which have one each.

    Args:
        device, log_path, memory_limit_bytes: as in `Worker`.
        alone: names of providers.
    """

    def __init__(
        self, device: str, log_path: str | Path, alone: Collection[str] = (), memory_limit_bytes: int | None = None
    ) -> None:
        self._start = functools.partial(Worker, device, log_path, memory_limit_bytes)
        self._alone = frozenset(alone)
        self._workers: dict[str | None, Worker] = {}

    def of(self, provider: str) -> Worker:
        """The worker of a provider, alive: started when there is none, or when the one there was has ended.

        Raises:
            RuntimeError: when the process does not come up.
        """
        key = provider if provider in self._alone else None
        if key not in self._workers or not self._workers[key].alive:
            if key in self._workers:
                self._workers.pop(key).stop()
            self._workers[key] = self._start()
        return self._workers[key]

    def stop(self) -> None:
        """End all of them at once."""
        while self._workers:
            self._workers.popitem()[1].stop()


@contextlib.contextmanager
def _interrupt_held() -> Iterator[None]:
    """Processes started in here never see Ctrl-C; this one sees it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # not on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def available_memory_bytes() -> int:
    """Host memory that this process and its children may still take: the system's, or its control group's if less."""
    available = psutil.virtual_memory().available
    for limit_file, use_file, reclaimable in _CGROUP_FILES:
        root = Path("/sys/fs/cgroup")
        try:
            limit = int((root / limit_file).read_text())  # "max" where there is none
            used = int((root / use_file).read_text())
            stat = dict(line.split() for line in (root / use_file).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        available = min(available, limit - used + int(stat.get(reclaimable, 0)))
    return max(available, 0)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB of memory"
