"""Plots of stored runs: throughput and peak memory against sequence length, as PNG and SVG."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdnbench.bench.results import MODES

from . import style
from .runs import Run, describe
from .tables import Row, constants, to_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 12  # in a panel, before only the fastest chunk size of each provider is drawn
MOST_TICKS = 7
PANEL_INCHES = (2.9, 2.4)
LEGEND_INCHES = 1.9
PNG_DPI = 200
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mdnbench",  # the same data gives the same file
}
PAPER_STYLE = STYLE | {
    "font.family": "serif",
    "font.serif": ["Times New Roman", "Nimbus Roman", "STIXGeneral", "DejaVu Serif"],
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.0,
}
STYLES = {"screen": STYLE, "paper": PAPER_STYLE}


@dataclass(frozen=True)
class Quantity:
    """What a figure shows: a metric, the figure's title, the axis label, how a tick reads, and where ticks may be."""

    metric: str
    title: str
    label: str
    tick: Callable[[float], str]
    base: int  # 10: ticks at 1, 2, 5 of each decade; 2: at powers of two


FIGURES = {
    "throughput": Quantity("tokens_per_s", "Throughput", "tokens/s", style.rate_tick, 10),
    "memory": Quantity("peak_memory_bytes", "Peak memory", "peak memory", style.bytes_tick, 2),
}

Shape = tuple[int, int, int, int, int]  # batch, heads, value_heads, head_dim_k, head_dim_v: a column of panels
Way = tuple[str, str, str, int, str]  # device, dtype, gates, index of the mode, regime: a row of panels
Panels = dict[tuple[Shape, Way], list[Row]]


def check_style(name: str) -> None:
    """Raises a ValueError for a name that is no style of figures."""
    if name not in STYLES:
        raise ValueError(f"--style {name!r} is unknown: choose from {', '.join(STYLES)}")


def write_plots(runs: Sequence[Run], folder: Path, style_name: str = "screen") -> list[Path]:
    """Write `throughput`, `memory` and `roofline` as .png and .svg; what no point has is left out.

    The style "paper" has serif letters, and leaves titles and footers to the caption.

    A panel holds one shape and one kind of device, dtype, gate profile, mode and regime: CPU and GPU rows, or eager and
    graph rows, never share one.
    """
    import matplotlib

    from . import roofline

    written = []
    with matplotlib.rc_context(STYLES[style_name]):
        bare = style_name == "paper"
        figures = {name: draw(runs, quantity, bare) for name, quantity in FIGURES.items()}
        figures["roofline"] = roofline.draw(runs, bare)
        for name, figure in figures.items():
            if figure is None:
                continue
            for suffix, options in ((".png", {"dpi": PNG_DPI}), (".svg", {"metadata": {"Date": None}})):
                path = folder / f"{name}{suffix}"
                figure.savefig(path, **options)
                written.append(path)
    return written


def draw(runs: Sequence[Run], quantity: Quantity, bare: bool = False) -> Figure | None:
    """The figure of one quantity, None when no point has it; `bare` leaves out title and footer.

    Line styles tell chunk sizes apart. With several runs they tell the runs apart instead, and with more than
    MOST_LINES lines in a panel nothing: each provider is then drawn at its fastest chunk size, and the footer says so.
    """
    from matplotlib.figure import Figure

    rows = [row for row in to_rows(runs) if row["status"] == "ok" and row[quantity.metric]]
    if not rows:
        return None
    strand = "run" if len({row["run"] for row in rows}) > 1 else "chunk_size"
    panels = _panels(rows)
    fastest = strand == "run" or max(len({_series(row) for row in found}) for found in panels.values()) > MOST_LINES
    if fastest:
        panels = {place: _fastest_chunk(found) for place, found in panels.items()}
    strands = [] if fastest and strand == "chunk_size" else _strands(rows, strand)
    styles = dict(zip(strands, cycle(style.LINE_STYLES)))
    looks = style.looks(
        (row["operator"], row["provider"]) for row in sorted(rows, key=lambda row: style.operator_rank(row["operator"]))
    )

    shapes, ways = sorted({shape for shape, _ in panels}), sorted({way for _, way in panels})
    in_row = {way: [shape for shape in shapes if (shape, way) in panels] for way in ways}
    columns = max(map(len, in_row.values()))
    width = PANEL_INCHES[0] * columns + LEGEND_INCHES
    footer = "" if bare else _footer(runs, rows, quantity, fastest, characters=int(width * 18))
    below, above = (0.02, 0.02) if bare else (0.15 * (footer.count("\n") + 1) + 0.15, 0.35)
    height = PANEL_INCHES[1] * len(ways) + below + above
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, below / height, 1, 1 - (below + above) / height), hspace=0.05)
    title = "" if bare else f"{quantity.title} against sequence length"
    figure.text(0.1 / width, 1 - 0.1 / height, title, va="top", size=10, weight="bold")
    figure.text(0.1 / width, 0.08 / height, footer, va="bottom", size=7, color="#444444", linespacing=1.3)

    grid = figure.subplots(len(ways), columns, sharex="row", sharey="row", squeeze=False)
    for line, way in zip(grid, ways):
        for axes, shape in zip(line, in_row[way]):
            name = f"{_shape_title(shape, shapes)}: {_way_title(way, ways)}"
            axes.set_title(name if len(name) <= 40 else name.replace(": ", "\n"))
            axes.set_xlabel("sequence length (tokens)")
            _draw_panel(axes, panels[shape, way], quantity, looks, strand, styles)
        for axes in line[len(in_row[way]) :]:
            axes.set_visible(False)
        found = [row for shape in in_row[way] for row in panels[shape, way]]
        _scale_x(line[0], sorted({row["seq_len"] for row in found}))
        _scale_y(line[0], [row[quantity.metric] for row in found], quantity)
        line[0].set_ylabel(quantity.label)
    _add_legend(figure, rows, looks, strand, styles)
    return figure


def _panels(rows: Sequence[Row]) -> Panels:
    panels: Panels = defaultdict(list)
    for row in rows:
        shape = tuple(row[name] for name in ("batch", "heads", "value_heads", "head_dim_k", "head_dim_v"))
        way = (row["device"], row["dtype"], row["gates"], MODES.index(row["mode"]), row["regime"])
        panels[shape, way].append(row)
    return panels


def _series(row: Row) -> tuple[Any, ...]:
    return row["run"], row["provider"], row["chunk_size"]


def _fastest_chunk(rows: Sequence[Row]) -> list[Row]:
    """For each run, provider and length, the row of the chunk size with the highest throughput."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row["run"], row["provider"], row["seq_len"]
        if key not in best or (row["tokens_per_s"] or 0) > (best[key]["tokens_per_s"] or 0):
            best[key] = row
    return list(best.values())


def _strands(rows: Sequence[Row], strand: str) -> list[Any]:
    """The values that line styles tell apart: runs in the order given, chunk sizes by size."""
    values = {row[strand] for row in rows if row[strand] is not None}
    return sorted(values) if strand == "chunk_size" else list(dict.fromkeys(row[strand] for row in rows))


def _draw_panel(
    axes: Axes,
    rows: Sequence[Row],
    quantity: Quantity,
    looks: dict[str, style.Look],
    strand: str,
    styles: dict[Any, Any],
) -> None:
    lines: dict[tuple[str, Any], list[Row]] = defaultdict(list)
    for row in rows:
        lines[row["provider"], row[strand] if styles else None].append(row)
    for (provider, value), found in lines.items():
        found.sort(key=lambda row: row["seq_len"])
        x, y = [row["seq_len"] for row in found], [row[quantity.metric] for row in found]
        look = looks[provider]
        axes.plot(x, y, color=look.colour, marker=look.marker, linestyle=styles.get(value, "-"), alpha=0.9)
        held = [index for index, row in enumerate(found) if row["slowed_by"]]
        if held:  # open markers
            at = [x[index] for index in held], [y[index] for index in held]
            axes.plot(*at, color=look.colour, marker=look.marker, linestyle="none", markerfacecolor="white", zorder=3)
        if quantity.metric == "tokens_per_s":
            _draw_intervals(axes, found, look.colour)


def _draw_intervals(axes: Axes, rows: Sequence[Row], colour: str) -> None:
    """Upright bars: the reported interval of the median time, turned into throughput."""
    known = [row for row in rows if row["latency_low_ms"] and row["latency_high_ms"]]
    tokens = [row["tokens_per_s"] * row["latency_ms"] for row in known]
    low = [number / row["latency_high_ms"] for number, row in zip(tokens, known)]
    high = [number / row["latency_low_ms"] for number, row in zip(tokens, known)]
    axes.vlines([row["seq_len"] for row in known], low, high, color=colour, linewidth=0.8, alpha=0.7)


def _scale_x(axes: Axes, lengths: Sequence[int]) -> None:
    """A tick at each measured length, or at every second, third, ... of many; the longest always has one."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    step = math.ceil(len(lengths) / MOST_TICKS)
    axes.xaxis.set_major_locator(FixedLocator(lengths[::-1][::step][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.count(round(value))))
    axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)


def _scale_y(axes: Axes, values: Sequence[float], quantity: Quantity) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high, ticks = log_scale(min(values), max(values), quantity.base)
    axes.set_yscale("log", base=quantity.base)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity.tick(value)))
    axes.set_ylim(low, high)


def log_scale(low: float, high: float, base: int) -> tuple[float, float, list[float]]:
    """Limits of a log axis a little outside of [low, high], and 2 to MOST_TICKS round ticks within them: powers of two
    for base 2; 1, 2, 5 of each decade for base 10, fewer where the axis spans many."""
    margin = max(1.05, (high / low) ** 0.06)
    bottom, top = low / margin, high * margin
    ladders = [[2.0 ** (power * step) for power in range(-10 // step, 60 // step)] for step in (1, 2, 3, 5, 10)]
    if base == 10:
        ladders = [
            [step * 10.0**power for power in range(-9, 16) for step in steps] for steps in ((1, 2, 5), (1, 3), (1,))
        ]
    ticks: list[float] = []
    for ladder in ladders:
        while sum(bottom <= tick <= top for tick in ladder) < 2:  # too few: move out the limit with the nearer tick
            below, above = max(tick for tick in ladder if tick < bottom), min(tick for tick in ladder if tick > top)
            bottom, top = (below, top) if bottom / below < above / top else (bottom, above)
        ticks = [tick for tick in ladder if bottom <= tick <= top]
        if len(ticks) <= MOST_TICKS:
            break
    return bottom, top, ticks


def _shape_title(shape: Shape, shapes: Sequence[Shape]) -> str:
    """Head dims always; batch and heads where shapes differ in them."""
    batch, heads, value_heads, k, v = shape
    parts = [f"K {k}, V {v}"]
    if len({other[0] for other in shapes}) > 1:
        parts.append(f"B {batch}")
    if len({other[1:3] for other in shapes}) > 1:
        parts.append(f"H {heads}" if heads == value_heads else f"H {heads}/{value_heads}")
    return ", ".join(parts)


def _way_title(way: Way, ways: Sequence[Way]) -> str:
    """The mode always; device, dtype, gates and regime where rows of panels differ in them."""
    device, dtype, gates, mode, regime = way
    launch, _, cache = regime.partition("-")
    calls = (f"{launch} calls" if launch == "eager" else f"CUDA {launch}") + (f", {cache} L2" if cache else "")
    texts = (device, dtype, f"gates {gates}", None, calls)
    different = [text for index, text in enumerate(texts) if text and len({other[index] for other in ways}) > 1]
    return ", ".join([style.MODE_TITLES[MODES[mode]], *different])


def _footer(runs: Sequence[Run], rows: Sequence[Row], quantity: Quantity, fastest: bool, characters: int) -> str:
    """What all points share, where each run was made, and what the figure leaves out."""
    lines = [f"{constants(rows)}."]
    for run in runs:
        name = f"{run.name}: " if len(runs) > 1 else ""
        lines.append(name + (describe(run.environment) or "environment not recorded"))
    notes = []
    if fastest and len({row["chunk_size"] for row in rows} - {None}) > 1:
        notes.append("Each provider at its fastest chunk size for that length.")
    if quantity.metric == "tokens_per_s":
        notes.append("Upright bars: 95 % confidence interval of the median (± 0.5 % at least).")
    if any(row["slowed_by"] for row in rows):
        notes.append("Open markers: the GPU was held back (power, heat).")
    missing = sum(record.status != "ok" for run in runs for record in run.records)
    if missing:
        notes.append(f"{missing} points without a time are not drawn: see the table.")
    lines.append(" ".join(notes))
    return "\n".join(part for line in lines for part in textwrap.wrap(line, characters))


def _add_legend(
    figure: Figure, rows: Sequence[Row], looks: dict[str, style.Look], strand: str, styles: dict[Any, Any]
) -> None:
    """To the right of the panels: providers under their operator, then what line styles mean."""
    from matplotlib.lines import Line2D

    handles, headings = [], []

    def heading(text: str) -> None:
        headings.append(len(handles))
        handles.append(Line2D([], [], linestyle="none", label=text))

    operators = dict.fromkeys(
        row["operator"] for row in sorted(rows, key=lambda row: style.operator_rank(row["operator"]))
    )
    for operator in operators:
        heading(style.OPERATOR_TITLES.get(operator, operator))
        for provider in dict.fromkeys(row["provider"] for row in rows if row["operator"] == operator):
            look = looks[provider]
            handles.append(Line2D([], [], color=look.colour, marker=look.marker, label=provider))
    if len(styles) > 1:
        heading("Run" if strand == "run" else "Chunk size")
        handles += [Line2D([], [], color="#555555", linestyle=line, label=str(value)) for value, line in styles.items()]
    legend = figure.legend(handles=handles, loc="outside right upper", handlelength=2.4)
    for index in headings:
        legend.get_texts()[index].set_weight("bold")
