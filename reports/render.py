"""The tables as Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mdnbench.bench.quality import clock_drift, summary

from . import style, tables
from .runs import Run, describe

if TYPE_CHECKING:
    from rich.console import Console

NOTES = (
    "Time: median, ± half of its 95 % confidence interval (0.5 % at least), or (n=samples) where they are too few for "
    "one. MiB: peak memory. Error: worst relative error of the output and gradients against float64."
)
THROTTLE_NOTE = f"{style.THROTTLED.strip()} marks times taken while the GPU was held back: see the notes."


def markdown(runs: Sequence[Run]) -> str:
    """The tables of a report as one Markdown document, the best of each problem in bold."""
    rows = tables.to_rows(runs)
    lines = [f"# {', '.join(run.name for run in runs)}", ""]
    for run in runs:
        name = f"{run.name}: " if len(runs) > 1 else ""
        lines += [f"{name}{describe(run.environment) or 'environment not recorded'}", ""]
    throttled = f" {THROTTLE_NOTE}" if any(row["slowed_by"] for row in rows) else ""
    lines += [f"Every row: {tables.constants(rows)}. {NOTES}{throttled}", ""]
    for block in tables.blocks(rows):
        lines += [f"## {block.title}", "", _line(block.header)]
        lines += [_line(["---:" if numeric else "---" for numeric in block.numeric])]
        lines += [_line([f"**{cell.text}**" if cell.best else cell.text for cell in row]) for row in block.rows]
        lines += [""]
    lines += [line for note in tables.notes(rows) for line in (f"Note on {note}.", "")]
    seen = measurement_notes(runs)
    if seen:
        lines += ["## Notes on the measurements", "", *(f"- {text}." for text in seen), ""]
    failures = tables.failures(rows)
    if failures:
        lines += ["## Without a time", "", _line(["status", "points", "providers", "reason"]), _line(["---"] * 4)]
        lines += [
            _line([failure.status, str(failure.count), ", ".join(failure.providers), failure.reason])
            for failure in failures
        ]
        lines += [""]
    return "\n".join([*lines, f"{tables.counts(rows)}.", ""])


def measurement_notes(runs: Sequence[Run]) -> list[str]:
    """What was seen in the samples and the GPU's state, a sentence each with its remedy."""
    found = []
    for run in runs:
        name = f"{run.name}: " if len(runs) > 1 else ""
        found += [name + text for text in (clock_drift(run.records), *summary(run.records)) if text]
    return found


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def show(console: Console, runs: Sequence[Run]) -> None:
    """Print the tables. The best is bold on a terminal; in plain text it is followed by a star."""
    from rich.padding import Padding
    from rich.text import Text

    rows = tables.to_rows(runs)
    plain = not console.is_terminal
    for run in runs:
        name = f"{run.name}: " if len(runs) > 1 else ""
        console.print(Text(name + (describe(run.environment) or "environment not recorded")))
    console.print(Text(f"Every row: {tables.constants(rows)}."))
    blocks = tables.blocks(rows)
    for block in blocks:
        console.print()
        console.print(Text(block.title, style="bold"))
        print_table(console, block.header, block.rows, block.numeric)
    for note in tables.notes(rows):
        console.print()
        console.print(Text(f"Note on {note}."))
    for text in measurement_notes(runs):
        console.print()
        console.print(Text(f"{text}."))
    failures = tables.failures(rows)
    if failures:
        console.print()
        console.print(Text("Without a time", style="bold"))
    for failure in failures:
        text = f"{failure.count} {failure.status}: {', '.join(failure.providers)}: {failure.reason}"
        console.print(Padding(Text(text), (0, 0, 0, 2), expand=False))
    console.print()
    if any(cell.best for block in blocks for row in block.rows for cell in row):
        console.print(Text(f"{'* is' if plain else 'Bold is'} the best of its problem.", style="dim"))
    if any(row["slowed_by"] for row in rows):
        console.print(Text(THROTTLE_NOTE, style="dim"))
    if blocks:
        console.print(Text(NOTES, style="dim"))
    console.print(Text(f"{tables.counts(rows)}."))


def print_table(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[tables.Cell]], numeric: Sequence[bool]
) -> None:
    """Print aligned columns without lines; the best cells are bold on a terminal, followed by a star in plain text."""
    from rich.table import Table
    from rich.text import Text

    plain = not console.is_terminal
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="dim")
    starred = [plain and any(row[column].best for row in rows) for column in range(len(header))]
    for text, right, star in zip(header, numeric, starred):
        table.add_column(text + " " * (star and right), justify="right" if right else "left")
    for row in rows:
        texts = [
            Text(cell.text + ("*" if cell.best else " ") if star else cell.text, style="bold" if cell.best else "")
            for cell, star in zip(row, starred)
        ]
        table.add_row(*texts)
    console.print(table)
