"""Finds the fastest of the candidates that are right, for any kernel: compile, prune, check, short trials, finals.

Candidates are compiled in parallel, each in a process of its own; what compiled is checked at once, one after the
other, in a process that may die. Trials begin when the compilers are done and the host is quiet. In the finals the
fastest few are timed in alternation with the incumbent, which is timed twice a round: how far it is from itself is the
noise, and it keeps its place unless beaten by more.
"""

from __future__ import annotations

import contextlib
import math
import queue
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import paired
from .requests import Failure, PointFailed
from .tune_interface import Progress, Settings, Tunable
from .tune_log import Choice, Resources, Trial, TuneLog
from .tune_worker import Request, TuneWorker

SPILL_BYTES_ALLOWED = 256  # beyond twice those of the incumbent: spills beside many registers are cheap
REGISTERS_OF_A_PROGRAM = 65536
MIN_ROUNDS = 6  # an interval needs so many
WORKER_LOG = "worker.log"
_COMPILE_VARIABLES = {"TRITON_INTERPRET": None}


class Runner:
    """The process that checks and times candidates, which is replaced when it has died.

    Args:
        log: in whose folder the process logs.
        spare: whether another one stands by, started.
    """

    def __init__(self, log: TuneLog, spare: bool) -> None:
        self._log_path, self._spares = log.path.with_name(WORKER_LOG), spare
        self._worker: TuneWorker | None = None
        self._spare: TuneWorker | None = None

    def start(self, tunable: Tunable) -> None:
        """Start the process, without waiting for it, unless there is one: it is up when something is compiled."""
        if self._worker is None or not self._worker.alive:
            spare = self._spare if self._spare is not None and self._spare.running() else None
            self._worker = spare or TuneWorker(tunable, self._log_path, tunable.run_variables)
            self._spare = None

    def ask(self, request: Request, limit_s: float) -> Any:
        """See `TuneWorker.ask`."""
        tunable = request.tunable
        self.start(tunable)
        if self._spares and self._spare is None:
            self._spare = TuneWorker(tunable, self._log_path, tunable.run_variables)
        return self._worker.ask(request, limit_s)

    def stop(self) -> None:
        """End the processes at once."""
        for worker in (self._worker, self._spare):
            if worker is not None:
                worker.stop()
        self._worker = self._spare = None


class Search:
    """One search over several tunables.

    Args:
        tunables: their candidates are compiled together and chosen apart.
        log: keeps what is found; what it has already is not done again.
        settings: limits.
        watch: called with the progress after each step, and a few times a second while it waits.
        runner: runs the candidates; None for one that ends with the search.
    """

    def __init__(
        self,
        tunables: Sequence[Tunable],
        log: TuneLog,
        settings: Settings,
        watch: Callable[[Progress], None],
        runner: Runner | None = None,
    ) -> None:
        self.log, self.settings, self.watch = log, settings, watch
        self.tunables = {tunable.name: tunable for tunable in tunables}
        self.trials = {
            name: [log.trial(name, candidate) for candidate in tunable.candidates()]
            for name, tunable in self.tunables.items()
        }
        self.progress = Progress(sum(map(len, self.trials.values())))
        self._start = self._phase_start = time.monotonic()
        self._worker_log = log.path.with_name(WORKER_LOG)
        self._stops_runner = runner is None
        self._runner = runner or Runner(log, settings.spare)

    def run(self) -> list[Choice]:
        """Search; the choices in the order of the tunables, without those for which no candidate is right.

        Raises:
            RuntimeError: when no process comes up.
        """
        try:
            open_names = [name for name in self.tunables if name not in self.log.choices or self._reopen(name)]
            self._compile_and_check([trial for name in open_names for trial in self.trials[name]])
            self._time([trial for name in open_names for trial in self.trials[name] if trial.stage == "checked"])
            self._phase("finals", len(open_names))
            for name in open_names:
                self._choose(name)
                self._tell(1)
        finally:
            if self._stops_runner:
                self._runner.stop()
        return [self.log.choices[name] for name in self.tunables if name in self.log.choices]

    def _reopen(self, name: str) -> bool:
        """Whether the search that is gone on with ran out of time here; those timed then take part in the finals."""
        if all(it.stage == "done" for it in self.trials[name]):
            return False
        for it in self.trials[name]:
            if it.status in ("ok", "slower"):
                it.stage, it.status = "timed", None
        return True

    def _compile_and_check(self, trials: list[Trial]) -> None:
        todo = [trial for trial in trials if trial.stage is None]
        firsts = [trial for trial in todo if trial is self._incumbent(trial)]  # others are pruned against them
        todo = firsts + [trial for trial in todo if trial is not self._incumbent(trial)]
        self._phase("compiling and checking", len(todo))
        if not todo:
            return
        for trial in [it for it in todo if not self.tunables[it.tunable].compiled_first]:
            todo.remove(trial)
            if self._over(0.6):
                return
            self._judge(trial, [])
            self._tell(1)
        if todo:
            self._runner.start(self.tunables[todo[0].tunable])
        waiting: list[tuple[Trial, Any]] = []
        with contextlib.closing(self._compiled(todo)) as compiled:
            for trial, outcome in compiled:
                if trial is None:
                    self._tell(0)
                else:
                    waiting.append((trial, outcome))
                    if trial is self._incumbent(trial) and isinstance(outcome, list):
                        trial.resources = outcome
                if self._over(0.6):
                    return
                pending = {id(first) for first in firsts if first.stage is None and not first.resources}
                for item in list(waiting):
                    first = self._incumbent(item[0])
                    if item[0] is first or id(first) not in pending:
                        waiting.remove(item)
                        self._judge(*item)
                        self._tell(1)

    def _judge(self, trial: Trial, outcome: list[Resources] | Failure) -> None:
        """Prune, or check, what a compiler gave."""
        if isinstance(outcome, Failure):
            return self._end(trial, outcome.status, outcome.reason)
        trial.resources = outcome
        reason = self._pruned(trial)
        if reason is not None:
            return self._end(trial, "pruned", reason)
        try:
            reason = self._ask("check", trial, self.settings.check_limit_s)
        except PointFailed as stop:
            return self._end(trial, stop.failure.status, stop.failure.reason)
        if reason is not None:
            return self._end(trial, "incorrect", reason)
        trial.stage = "checked"
        return self.log.put(trial)

    def _pruned(self, trial: Trial) -> str | None:
        tunable, first = self.tunables[trial.tunable], self._incumbent(trial)
        limit = tunable.shared_memory_bytes
        known = {it.kernel: it.spill_bytes for it in first.resources}
        for it in trial.resources:
            if limit is not None and it.shared_bytes > limit:
                return f"{it.kernel} needs {it.shared_bytes} bytes of shared memory, the GPU has {limit}"
            if it.registers * it.num_warps * 32 > REGISTERS_OF_A_PROGRAM:
                return f"{it.kernel} needs {it.registers} registers a thread for {it.num_warps} warps"
            allowed = SPILL_BYTES_ALLOWED + 2 * known.get(it.kernel, 0)
            if trial is not first and it.spill_bytes > allowed:
                return f"{it.kernel} spills {it.spill_bytes} bytes a thread, {allowed} are allowed"
        return None

    def _time(self, trials: list[Trial]) -> None:
        self._phase("short trials", len(trials))
        for trial in trials:
            if self._over(0.8) and trial is not self._incumbent(trial):
                continue
            latency = self._sample(trial, self.settings.trial_s)
            if latency is not None:
                trial.latency_ms, trial.stage = latency, "timed"
                self.log.put(trial)
                best = min(it.latency_ms for it in self.trials[trial.tunable] if it.latency_ms is not None)
                self.progress.best[trial.tunable] = f"{best:.4g} ms"
            self._tell(1)

    def _choose(self, name: str) -> None:
        """The finals of a tunable, and its choice."""
        first = self.trials[name][0]
        timed = sorted((it for it in self.trials[name] if it.stage == "timed"), key=lambda it: it.latency_ms)
        if not timed:
            return None
        base = first if first in timed else timed[0]
        finalists = [it for it in timed if it is not base][: self.settings.finalists]
        for it in timed:
            if it is not base and it not in finalists:
                self._end(it, "slower", f"{it.latency_ms:.4g} ms in the trial, {timed[0].latency_ms:.4g} is the best")
        estimates, noise, medians = self._finals(base, finalists)
        if base.stage != "timed":  # it died of the finals
            return self._choose(name)
        margin = math.log1p(noise or 0.0)
        beating = {
            key: it for key, it in estimates.items() if it.high is not None and max(it.high, it.centre + margin) < 0
        }
        by_key = {id(it): it for it in finalists}
        winner = by_key[min(beating, key=lambda key: beating[key].centre)] if beating else base
        won = estimates.get(id(winner))
        order = sorted((it for it in (base, *finalists) if it.stage == "timed"), key=lambda it: medians[id(it)])
        self._settle(base, winner, order, estimates, margin)
        self.log.choose(
            Choice(
                name,
                winner.candidate,
                medians[id(winner)],
                medians[id(base)] if base is first else None,
                *((math.exp(won.centre), math.exp(won.low), math.exp(won.high)) if won else (1.0, None, None)),
                noise,
                tuple(it.candidate for it in order if it is not winner),
            )
        )
        self.progress.best[name] = f"{medians[id(winner)]:.4g} ms"
        return None

    def _settle(
        self, base: Trial, winner: Trial, order: list[Trial], estimates: dict[int, paired.Estimate], margin: float
    ) -> None:
        """The statuses of the finalists."""
        reached = estimates[id(winner)].centre if id(winner) in estimates else 0.0
        for it in order:
            centre = estimates[id(it)].centre if id(it) in estimates else 0.0
            compared = "the incumbent" if it is base else f"{math.exp(centre):.3f} of the time of the incumbent"
            if it is winner:
                self._end(it, "ok", f"chosen: {compared}")
            elif centre - reached > margin:
                self._end(it, "slower", f"{compared}; the choice takes {math.exp(reached):.3f} of it")
            else:
                self._end(it, "ok", f"{compared}; within the noise of the choice")

    def _finals(
        self, base: Trial, finalists: list[Trial]
    ) -> tuple[dict[int, paired.Estimate], float | None, dict[int, float]]:
        """Log-ratios to the incumbent by the id of a trial, the noise, and medians in ms."""
        ratios: dict[int, list[float]] = {id(it): [] for it in finalists}
        latencies: dict[int, list[float]] = {id(it): [] for it in (base, *finalists)}
        same: list[float] = []
        for number in range(self.settings.rounds if finalists else 0):
            if number >= MIN_ROUNDS and self._over(1.0):
                break
            order = [it for it in (finalists if number % 2 else finalists[::-1]) if it.stage == "timed"]
            found = {}
            for key, it in [("before", base), *((id(it), it) for it in order), ("after", base)]:
                found[key] = self._sample(it, self.settings.block_s, keep=True)
                self._tell(0)
            before, after = found.pop("before"), found.pop("after")
            if before is None or after is None:
                break
            same.append(math.log(after / before))
            latencies[id(base)] += (before, after)
            for key, latency in found.items():
                if latency is not None:
                    ratios[key].append(math.log(latency / math.sqrt(before * after)))
                    latencies[key].append(latency)
        right = [it for it in finalists if it.stage == "timed" and ratios[id(it)]]
        noise = paired.noise_floor(same, len(same), max(1, len(right))) if same else None
        medians = {id(it): statistics.median(latencies[id(it)] or [it.latency_ms]) for it in (base, *finalists)}
        return {id(it): paired.estimate(ratios[id(it)]) for it in right}, noise, medians

    def _sample(self, trial: Trial, seconds: float, keep: bool = False) -> float | None:
        """The median of a block in ms; None when the candidate failed, which is then its status."""
        limit_s = self.settings.sample_limit_s
        try:
            return statistics.median(self._ask("sample", trial, limit_s, seconds, self.settings.max_samples, keep))
        except PointFailed as stop:
            self._end(trial, stop.failure.status, stop.failure.reason)
            return None

    def _ask(self, work: str, trial: Trial, limit_s: float, *numbers: float) -> Any:
        return self._runner.ask(Request(work, self.tunables[trial.tunable], trial.candidate, *numbers), limit_s)

    def _compiled(self, trials: list[Trial]) -> Iterator[tuple[Trial | None, Any]]:
        """Trials with what they need or why they failed, as compilers are done; (None, None) while none is."""
        todo: queue.SimpleQueue[Trial] = queue.SimpleQueue()
        for trial in trials:
            todo.put(trial)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stopped = threading.Event()
        workers: dict[int, TuneWorker] = {}

        def work(slot: int) -> None:
            try:
                while not stopped.is_set():
                    trial = todo.get_nowait()
                    tunable = self.tunables[trial.tunable]
                    if slot not in workers or not workers[slot].alive:
                        workers[slot] = TuneWorker(tunable, self._worker_log, _COMPILE_VARIABLES, runs=False)
                    request = Request("compile", tunable, trial.candidate)
                    try:
                        outcome = workers[slot].ask(request, self.settings.compile_limit_s)
                    except PointFailed as stop:
                        outcome = stop.failure
                    trial.compile_s = round(workers[slot].took_s, 3)
                    done.put((trial, outcome))
            except queue.Empty:
                pass
            except Exception as fault:  # raised again by the thread that reads
                done.put(fault)
            finally:
                if slot in workers:
                    workers[slot].stop()

        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(min(self.settings.jobs, len(trials)))]
        for thread in threads:
            thread.start()
        left = len(trials)
        try:
            while left:
                try:
                    item = done.get(timeout=0.2)
                except queue.Empty:
                    yield None, None
                    continue
                if isinstance(item, Exception):
                    raise item
                left -= 1
                yield item
        finally:
            stopped.set()
            if left:
                for worker in list(workers.values()):
                    worker.kill()
            for thread in threads:
                thread.join()

    def _incumbent(self, trial: Trial) -> Trial:
        return self.trials[trial.tunable][0]

    def _end(self, trial: Trial, status: str, reason: str) -> None:
        trial.stage, trial.status, trial.reason = "done", status, reason
        self.log.put(trial)

    def _over(self, part: float) -> bool:
        seconds = self.settings.seconds
        return seconds is not None and time.monotonic() - self._start > part * seconds

    def _phase(self, name: str, of: int) -> None:
        self.progress.phase, self.progress.done, self.progress.of = name, 0, of
        self._phase_start = time.monotonic()
        self._tell(0)

    def _tell(self, steps: int) -> None:
        progress = self.progress
        progress.done += steps
        progress.counts = Counter(
            it.status or ("to do" if it.stage is None else "right so far")
            for trials in self.trials.values()
            for it in trials
        )
        now = time.monotonic()
        progress.seconds_left = None
        if progress.done:
            progress.seconds_left = (now - self._phase_start) / progress.done * (progress.of - progress.done)
        if self.settings.seconds is not None:
            rest = max(0.0, self.settings.seconds - (now - self._start))
            progress.seconds_left = rest if progress.seconds_left is None else min(rest, progress.seconds_left)
        self.watch(progress)
