"""The roofline: every provider's rate against its arithmetic intensity, under the ceilings measured on that machine.

Williams, Waterman and Patterson, Communications of the ACM 52 (2009). Rate and intensity are by the operators' counts
of operations and of the bytes that have to be moved; the ceilings are those of `mdnbench peaks`.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mdnbench.bench.metrics import matrix_peak
from mdnbench.bench.results import MODES

from . import style
from .plots import log_scale
from .runs import Run, describe
from .tables import Row, to_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PANEL_INCHES = (3.6, 2.8)
LEGEND_INCHES = 1.9
LABELS_APART = 1.4  # ceilings nearer to one another than by this factor have their labels one below the other


def draw(runs: Sequence[Run], bare: bool = False) -> Figure | None:
    """A panel for each mode and dtype; None when no row has counts, or no run has peaks.

    Args:
        runs: those without peaks are left out.
        bare: without title and footer.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    peaks = {run.name: run.environment.get("peaks") for run in runs}
    rows = [
        row for row in to_rows(runs) if row["tflops"] and row["arithmetic_intensity"] and row["percent_of_roofline"]
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: style.operator_rank(row["operator"]))
    looks = style.looks((row["operator"], row["provider"]) for row in rows)
    panels: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        panels[MODES.index(row["mode"]), row["dtype"]].append(row)
    width = PANEL_INCHES[0] * len(panels) + LEGEND_INCHES
    places = "; ".join(dict.fromkeys(describe(run.environment) for run in runs if peaks[run.name]))
    note = textwrap.wrap(f"A point a row, larger for longer sequences. {places}", int(width * 18))
    below, above = (0.0, 0.0) if bare else (0.15 * len(note) + 0.15, 0.3)
    height = PANEL_INCHES[1] + below + above
    figure = Figure(figsize=(width, height), layout="constrained")
    if not bare:
        figure.get_layout_engine().set(rect=(0, below / height, 1, 1 - (below + above) / height))
        figure.text(0.1 / width, 1 - 0.08 / height, "Roofline", va="top", size=10, weight="bold")
        figure.text(0.1 / width, 0.08 / height, "\n".join(note), va="bottom", size=7, color="#444444", linespacing=1.3)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    tops = [matrix_peak(peaks[row["run"]], row["dtype"]) / 1e12 for row in rows]
    labels = max(len({_label(peaks[row["run"]], row["dtype"]) for row in found}) for found in panels.values())
    bottom, top, ticks = log_scale(min(row["tflops"] for row in rows), max(tops) * 1.3**labels, 10)
    for axes, (mode, dtype) in zip(grid, sorted(panels)):
        _draw_panel(axes, panels[mode, dtype], peaks, dtype, looks)
        _set_scale(axes.yaxis, ticks)
        axes.set_ylim(bottom, top)
        axes.set_title(f"{style.MODE_TITLES[MODES[mode]]}, {dtype}")
    grid[0].set_ylabel("TFLOP/s")
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", label=provider)
        for provider, look in looks.items()
    ]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _draw_panel(
    axes: Axes, rows: Sequence[Row], peaks: dict[str, Any], dtype: str, looks: dict[str, style.Look]
) -> None:
    longest = max(row["seq_len"] for row in rows)
    for row in rows:
        look = looks[row["provider"]]
        axes.plot(
            row["arithmetic_intensity"],
            row["tflops"],
            color=look.colour,
            marker=look.marker,
            markersize=2.5 + 4 * (row["seq_len"] / longest) ** 0.25,
            markerfacecolor="white" if row["slowed_by"] else look.colour,
            alpha=0.85,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    found = {row["run"]: peaks[row["run"]] for row in rows}
    ceilings = {name: (matrix_peak(those, dtype), those["copy_bytes_per_s"]) for name, those in found.items()}
    reach = [row["arithmetic_intensity"] for row in rows] + [top / band for top, band in ceilings.values()]
    low, high = min(reach) / 1.3, max(reach) * 1.3
    for top, band in ceilings.values():
        at = [low, top / band, high]
        axes.plot(at, [min(top, x * band) / 1e12 for x in at], color="#555555", linewidth=1.0)
    _label_ceilings(axes, found, dtype, high)
    left, right, ticks = log_scale(low, high, 10)
    _set_scale(axes.xaxis, ticks)
    axes.set_xlim(left, right)
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")


def _label(peaks: dict[str, Any], dtype: str) -> str:
    return f"{matrix_peak(peaks, dtype) / 1e12:.3g} TFLOP/s, {style.rate(peaks['copy_bytes_per_s'])}B/s copied"


def _label_ceilings(axes: Axes, peaks: dict[str, Any], dtype: str, right: float) -> None:
    """At the right end of each ceiling what it is; runs are named where their ceilings differ."""
    runs: dict[str, list[str]] = defaultdict(list)
    heights: dict[str, float] = {}
    for name, those in peaks.items():
        text = _label(those, dtype)
        runs[text].append(name)
        heights[text] = max(heights.get(text, 0.0), matrix_peak(those, dtype) / 1e12)
    groups: list[list[str]] = []
    for text in sorted(heights, key=heights.__getitem__, reverse=True):
        if groups and heights[groups[-1][-1]] < heights[text] * LABELS_APART:
            groups[-1].append(text)
        else:
            groups.append([text])
    for group in groups:
        lines = [f"{', '.join(runs[text])}: {text}" if len(runs) > 1 else text for text in group]
        at = (right, heights[group[0]])
        axes.annotate("\n".join(lines), at, ha="right", va="bottom", size=7, color="#444444")


def _set_scale(axis: Axis, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
