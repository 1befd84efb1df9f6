"""What a person sees while something runs: consoles, one-line errors and the progress of a sweep. Loads no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
PLAIN_WIDTH = 1000  # what is not read on a terminal is not wrapped, so that lines can be searched


def make_console(stderr: bool = False) -> Console:
    """A console on standard output or error; plain text without wrapping when that is no terminal."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return (
        console
        if console.is_terminal
        else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH, color_system=None)
    )


def fail(message: str) -> None:
    """Write one line to standard error."""
    print(f"mdnbench: {' '.join(message.split())}", file=sys.stderr)


def warn(message: str) -> None:
    """Write one line to standard error about something that does not end the command."""
    fail(f"warning: {message}")


def duration(seconds: float) -> str:
    """A rough duration: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class ProgressDisplay:
    """Shows progress on standard error: a bar on a terminal, else a line now and then. Use it as a context manager."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done: int | None = None  # None until the first update
        self._console = make_console(stderr=True)
        self._start = self._last_line = time.monotonic()
        self._bar = progress.Progress(
            progress.BarColumn(bar_width=10),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            progress.TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, left="")

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._bar.stop()

    def update(self, done: int, what: str, seconds_left: float | None = None) -> None:
        """Say that `done` of all are done and `what` is going on; without an estimate, time left follows from the
        time since the start."""
        self.done = done
        if seconds_left is None:
            seconds_left = (time.monotonic() - self._start) / max(1, done) * (self.total - done)
        left = f"{duration(seconds_left)} left"
        self._bar.update(self._task, completed=done, left=left, description=escape(what))
        if not self._console.is_terminal and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{done}/{self.total}, about {left}: {what}", file=sys.stderr, flush=True)


def print_table(console: Console, header: Sequence[str] | None, rows: Sequence[Sequence[str | Text]]) -> None:
    """Print aligned columns without lines, indented by two."""
    table = Table(*(header or ()), box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="dim")
    table.show_header = header is not None
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def print_item(console: Console, text: str) -> None:
    """Print a paragraph indented by two."""
    console.print(Padding(Text(text), (0, 0, 0, 2), expand=False))
