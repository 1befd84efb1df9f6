"""The roofline: every provider's rate against its arithmetic intensity, under the ceilings measured on that machine.

Williams, Waterman and Patterson, Communications of the ACM 52 (2009). Rate and intensity are by the operators' counts
of operations and of the bytes that have to be moved; the ceilings are those of `mdnbench peaks`.
"""

from __future__ import annotations

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
    height = PANEL_INCHES[1] + (0.0 if bare else 0.6)
    figure = Figure(figsize=(width, height), layout="constrained")
    if not bare:
        figure.get_layout_engine().set(rect=(0, 0.3 / height, 1, 1 - 0.6 / height))
        figure.text(0.1 / width, 1 - 0.08 / height, "Roofline", va="top", size=10, weight="bold")
        places = "; ".join(dict.fromkeys(describe(run.environment) for run in runs if peaks[run.name]))
        note = f"A point a row, larger for longer sequences. {places}"
        figure.text(0.1 / width, 0.08 / height, note, va="bottom", size=7, color="#444444")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    tops = [matrix_peak(peaks[row["run"]], row["dtype"]) / 1e12 for row in rows]
    bottom, top, ticks = log_scale(min(row["tflops"] for row in rows), max(tops) * 1.3, 10)
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
    low, high = (pick(row["arithmetic_intensity"] for row in rows) for pick in (min, max))
    for name in dict.fromkeys(row["run"] for row in rows):
        top, band = matrix_peak(peaks[name], dtype), peaks[name]["copy_bytes_per_s"]
        ridge = top / band
        low, high = min(low, ridge) / 1.3, max(high, ridge) * 1.3
        at = [low, ridge, high]
        axes.plot(at, [min(top, x * band) / 1e12 for x in at], color="#555555", linewidth=1.0)
        text = f"{top / 1e12:.3g} TFLOP/s, {style.rate(band)}B/s copied"
        axes.annotate(text, (high, top / 1e12), ha="right", va="bottom", size=7, color="#444444")
    left, right, ticks = log_scale(low, high, 10)
    _set_scale(axes.xaxis, ticks)
    axes.set_xlim(left, right)
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")


def _set_scale(axis: Axis, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
