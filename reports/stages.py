"""Where the time of calls goes: a bar a provider, stacked by stage, from the profiles of `mdnbench profile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import style
from .plots import PNG_DPI, STYLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IDLE = "idle"
OTHER = "other"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#AA4499", "#117733", "#332288")
LEAST_PART = 0.06  # of the longest bar: shorter parts carry no number


def write_plots(profiles: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write stages.png and stages.svg.

    Args:
        profiles: as `profiling.Profile.to_dict` gives them.
        folder: it must exist.
    """
    import matplotlib

    with matplotlib.rc_context(STYLES["screen"]):
        figure = draw(profiles)
        written = []
        for suffix, options in ((".png", {"dpi": PNG_DPI}), (".svg", {"metadata": {"Date": None}})):
            written.append(folder / f"stages{suffix}")
            figure.savefig(written[-1], **options)
    return written


def draw(profiles: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure: one bar a provider, in ms a call, idle time last and hatched."""
    from matplotlib.figure import Figure

    totals: dict[str, float] = {}
    for profile in profiles:
        for stage, ms in profile["stages"].items():
            totals[stage] = totals.get(stage, 0.0) + ms
    order = sorted((stage for stage in totals if stage != IDLE), key=lambda stage: (stage == OTHER, -totals[stage]))
    colours = {stage: COLOURS[index % len(COLOURS)] for index, stage in enumerate(order)} | {OTHER: "#7F7F7F"}
    colours = {stage: colours[stage] for stage in order}
    height = 1.1 + 0.42 * len(profiles)
    figure = Figure(figsize=(8.5, height), layout="constrained")
    axes = figure.subplots()
    longest = max(profile["span_ms"] for profile in profiles)
    for y, profile in enumerate(profiles):
        left = 0.0
        for stage in [*order, IDLE]:
            ms = profile["stages"].get(stage, 0.0)
            if ms <= 0:
                continue
            idle = stage == IDLE
            axes.barh(
                y, ms, left=left, height=0.66, color="white" if idle else colours[stage],
                edgecolor="#777777" if idle else "white", linewidth=0.5, hatch="////" if idle else None,
            )  # fmt: skip
            if ms > LEAST_PART * longest and not idle:
                axes.text(left + ms / 2, y, f"{ms:.3g}", ha="center", va="center", size=7, color="white")
            left += ms
    axes.set_yticks(range(len(profiles)), [_label(profile) for profile in profiles])
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms a call, under the profiler")
    axes.set_title(_title(profiles[0]))
    _add_legend(figure, colours, any(profile["stages"].get(IDLE, 0) > 0 for profile in profiles), profiles[0]["device"])
    return figure


def _label(profile: Mapping[str, Any]) -> str:
    unit = "launches" if profile["device"] == "cuda" else "operators"
    return f"{profile['provider']}\n{profile['launches']:.0f} {unit}"


def _title(profile: Mapping[str, Any]) -> str:
    w = profile["workload"]
    shape = f"B {w['batch']}, T {style.count(w['seq_len'])}, H {w['heads']}, K {w['head_dim_k']}, V {w['head_dim_v']}"
    return f"Where the time goes: {style.MODE_TITLES[profile['mode']]}, {shape}, {w['dtype']}, {w['device']}"


def _add_legend(figure: Figure, colours: Mapping[str, str], idle: bool, device: str) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=stage) for stage, colour in colours.items()]
    if idle:
        label = "idle" if device == "cuda" else "outside of operators"
        handles.append(Patch(facecolor="white", edgecolor="#777777", hatch="////", label=label))
    figure.legend(handles=handles, loc="outside right upper")
