"""The history of measured points: a table of their steps, and a plot with the commits named."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdnbench.bench.history import Machine, Series, Step
from mdnbench.bench.results import Point

from . import style
from .plots import PNG_DPI, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 24
MOST_TICKS = 6
COLUMNS = 3
PANEL_INCHES = (3.6, 2.3)
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
SLOWER, FASTER = "#D55E00", "#009E73"

Panel = tuple[Point, str | None]  # a point on a device, with all drivers and versions


def short(commit: str) -> str:
    """A commit as people name it: seven digits, "+" where the code had changes."""
    return commit.rstrip("+")[:7] + ("+" if commit.endswith("+") else "")


def change(step: Step) -> str:
    """A step as people say it: `12.3 % slower`, `4.0 % faster`, of the time before."""
    part = abs(step.ratio - 1)
    return f"{part:.1%} {'slower' if step.ratio > 1 else 'faster'}".replace("%", " %")


def step_rows(series: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a step, the largest change first."""
    header = ["point", "machine", "commit", "change", "before ms", "after ms", "note"]
    found = [(it, step) for it in series for step in it.steps]
    rows = []
    for it, step in sorted(found, key=lambda pair: -abs(pair[1].ratio - 1)):
        levels = it.levels_ms()
        before = next(level for start, end, level in levels if start < step.index <= end)
        note = "" if step.confirmed else "newest value alone: one more run confirms it"
        times = f"{before:.4g}", f"{before * step.ratio:.4g}"
        rows.append([it.point.key, it.machine.label(), short(step.commit), change(step), *times, note])
    return header, rows


def to_json(series: Sequence[Series]) -> list[dict[str, Any]]:
    """One object a series, with its values and steps."""
    return [
        {
            "point": it.point.key,
            **asdict(it.machine),
            "values": [asdict(value) for value in it.values],
            "steps": [asdict(step) for step in it.steps],
        }
        for it in series
    ]


def check_plot_file(path: Path) -> None:
    """Whether `write_plot` can write this kind of file.

    Raises:
        ValueError: when it cannot.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {str(path)!r} must end with .png, .svg or .pdf")


def write_plot(series: Sequence[Series], path: Path) -> Path:
    """Draw the history of each point, as .png, .svg or .pdf by the file's name.

    A panel holds one point on one device, latency by commit. Drivers and versions are lines of their own. Points with
    steps come first; beyond MOST_PANELS panels the rest is left out, and the footer says so.

    Raises:
        ValueError: when there is nothing to draw, for another kind of file, or when it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    check_plot_file(path)
    panels: dict[Panel, list[Series]] = {}
    for it in series:
        panels.setdefault((it.point, it.machine.device_name), []).append(it)
    if not panels:
        raise ValueError("--plot: the history holds no times yet, so there is nothing to draw")
    by_steps = sorted(panels.items(), key=lambda item: -max(map(_largest, item[1])))
    drawn, left_out = by_steps[:MOST_PANELS], len(panels) - MOST_PANELS
    machines = list(dict.fromkeys(it.machine for _, found in drawn for it in found))
    colours = {machine: COLOURS[i % len(COLOURS)] for i, machine in enumerate(machines)}
    columns = min(COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    with matplotlib.rc_context(STYLE):
        width, footer = PANEL_INCHES[0] * columns, _footer(machines, left_out)
        above, below = 0.35, 0.16 * (len(footer) + 1)
        height = PANEL_INCHES[1] * rows + above + below
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(rect=(0, below / height, 1, 1 - (above + below) / height))
        figure.text(0.1 / width, 1 - 0.1 / height, "Latency by commit", va="top", size=10, weight="bold")
        for i, line in enumerate(footer):
            colour = colours[machines[i]] if i < len(machines) else "#444444"
            y = (below - 0.08 - 0.16 * (i + 1)) / height
            figure.text(0.1 / width, y, line, va="bottom", size=7, color=colour)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (place, found) in zip(grid, drawn):
            _draw(axes, place, found, colours)
        for axes in list(grid):
            axes.set_visible(False)
        options = {".png": {"dpi": PNG_DPI}, ".svg": {"metadata": {"Date": None}}}
        try:
            figure.savefig(path, **options.get(path.suffix, {}))
        except OSError as fault:
            raise ValueError(
                f"--plot {str(path)!r} cannot be written ({fault.strerror}): choose another file"
            ) from None
    return path


def _largest(series: Series) -> float:
    return max((abs(step.ratio - 1) for step in series.steps), default=0.0)


def _footer(machines: Sequence[Machine], left_out: int) -> list[str]:
    lines = [f"- {machine.label()}" for machine in machines]
    if left_out > 0:
        lines.append(f"{left_out} more points, whose steps are no larger, are not drawn")
    return lines


def _draw(axes: Axes, place: Panel, found: Sequence[Series], colours: dict[Machine, str]) -> None:
    commits = list(dict.fromkeys(value.commit for it in found for value in it.values))
    at = {commit: i for i, commit in enumerate(commits)}
    for it in found:
        places = [at[value.commit] for value in it.values]
        colour = colours[it.machine]
        axes.plot(places, [value.latency_ms for value in it.values], "o", color=colour, markersize=3)
        for start, end, level in it.levels_ms():
            axes.plot([places[start] - 0.3, places[end - 1] + 0.3], [level, level], color=colour)
        for step in it.steps:
            tint = SLOWER if step.ratio > 1 else FASTER
            x = places[step.index] - 0.5
            axes.axvline(x, color=tint, linestyle="--" if step.confirmed else ":", linewidth=0.9)
            label = f" {short(step.commit)}: {change(step)}{'' if step.confirmed else '?'}"
            left = x < len(commits) / 2
            axes.annotate(
                label if left else f"{label.strip()} ", (x, 1), xycoords=("data", "axes fraction"), va="top",
                ha="left" if left else "right", size=6.5, color=tint,
            )  # fmt: skip
    point, _ = place
    title = f"{point.provider} {style.MODE_SHORT[point.mode]} {point.regime}: {point.workload.label()}"
    axes.set_title("\n".join(textwrap.wrap(title, 52)), size=7)
    every = -(-len(commits) // MOST_TICKS)
    axes.set_xticks(range(0, len(commits), every), [short(commit) for commit in commits[::every]], size=6.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))  # room for the names
    axes.set_ylabel("latency (ms)")
