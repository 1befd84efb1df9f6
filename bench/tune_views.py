"""What a person sees of the tuner: progress while it searches, and tables of what is used and what was found."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .console import SECONDS_BETWEEN_LINES, duration, make_console, print_table
from .tune_interface import Progress
from .tune_log import STATUSES, Choice, Trial, TuneLog

INCUMBENT = "the incumbent"  # what `words` says of a choice that changes nothing
_STYLES = {"ok": "green", "incorrect": "red", "crashed": "red", "timeout": "red", "compile_error": "yellow"}


class TuneDisplay:
    """Shows progress on standard error: a few lines that change on a terminal, else a line now and then.

    Use it as a context manager, and call it with the progress.
    """

    def __init__(self) -> None:
        self.heading = ""
        self._console = make_console(stderr=True)
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._last = time.monotonic()

    def __enter__(self) -> TuneDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._console.is_terminal:
            if now - self._last >= 0.1:
                self._last = now
                self._live.update(lines_of(self.heading, progress), refresh=True)
        elif now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            parts = [f"{self.heading}: {_state(progress)}", _counts(progress).plain, *_best(progress)]
            print("; ".join(parts), file=sys.stderr, flush=True)


def lines_of(heading: str, progress: Progress) -> Group:
    """The lines on a terminal."""
    best = [Text(f"  {it}", "dim") for it in _best(progress)]
    return Group(Text(f"{heading}: {_state(progress)}"), Text("  ").append_text(_counts(progress)), *best)


def _best(progress: Progress) -> list[str]:
    return [f"best of {_short(name)}: {latency}" for name, latency in progress.best.items()]


def _state(progress: Progress) -> str:
    left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
    return f"{progress.phase} {progress.done}/{progress.of}{left}"


def _counts(progress: Progress) -> Text:
    """Candidates by status, in one order."""
    text = Text()
    for status in ("to do", "right so far", *STATUSES):
        if progress.counts[status]:
            text.append(f"{'' if not text else ', '}{progress.counts[status]} ")
            text.append(status.replace("_", " "), _STYLES.get(status, ""))
    return text


def _short(tunable: str) -> str:
    """The direction and the kernel of a tunable's name."""
    return " ".join(tunable.split()[:2])


def _workload(tunable: str) -> str:
    """The rest of it."""
    return " ".join(tunable.split()[2:])


def words(choice: Choice, log: TuneLog) -> str:
    """What a choice of a direction changes: fields with their values, and those of the incumbent."""
    before = log.incumbents(_workload(choice.tunable), {})[choice.tunable.split()[0]]
    changed = {name: value for name, value in choice.candidate.items() if value != before.get(name)}
    return " ".join(f"{name}={value} (was {before.get(name)})" for name, value in changed.items()) or INCUMBENT


def show_in_use(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """A row a shape and direction: GPU, shape, direction, configuration, ms, where it comes from."""
    print_table(console, ["GPU", "shape", "direction", "configuration", "ms", "from"], rows)


def show_statuses(console: Console, trials: Sequence[Trial]) -> None:
    """How many candidates of each kernel ended with which status, by workload, and an example of each fault."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for trial in trials:
        of_kernel = counts.setdefault(_workload(trial.tunable), {}).setdefault(_short(trial.tunable), Counter())
        of_kernel[trial.status or "not done"] += 1
    columns = [
        name for name in (*STATUSES, "not done") if any(it[name] for of in counts.values() for it in of.values())
    ]
    for workload, kernels in counts.items():
        console.print(Text(workload))
        rows = [[name, *(str(found[column] or "") for column in columns)] for name, found in kernels.items()]
        print_table(console, ["candidates of", *(column.replace("_", " ") for column in columns)], rows)
    compilers = [it.compile_s for it in trials if it.compile_s is not None]
    if compilers:
        console.print(
            f"  {len(compilers)} candidates were compiled, which one after the other would take {sum(compilers):.0f} s"
        )
    for status in ("incorrect", "crashed", "timeout", "compile_error"):
        first = next((it for it in trials if it.status == status), None)
        if first is not None:
            console.print(Text(f"  {status.replace('_', ' ')}, for example {_short(first.tunable)}: {first.reason}"))


def show_choices(console: Console, choices: Sequence[tuple[Choice, str]]) -> None:
    """A row a direction: what was chosen (in words), its time, that of the incumbent, and the ratio."""
    by_workload: dict[str, list[list[str]]] = {}
    for choice, what in choices:
        row = [
            choice.tunable.split()[0],
            _ms(choice.latency_ms),
            _ms(choice.incumbent_latency_ms),
            _ratio(choice),
            what,
        ]
        by_workload.setdefault(_workload(choice.tunable), []).append(row)
    for workload, rows in by_workload.items():
        console.print(Text(workload))
        print_table(console, ["direction", "ms", "incumbent ms", "ratio [95 % interval]", "chosen"], rows)


def _ms(latency: float | None) -> str:
    return "" if latency is None else f"{latency:.4g}"


def _ratio(choice: Choice) -> str:
    if choice.ratio_low is None or choice.ratio_high is None:
        return "" if choice.noise is None else f"1, noise {100 * choice.noise:.2g} %"
    return f"{choice.ratio:.3f} [{choice.ratio_low:.3f}, {choice.ratio_high:.3f}]"
