"""The command `mdnbench report`, and the reports that every sweep ends with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import arguments as arg
from .cli import BadInput, app, new_folder, validating
from .console import make_console, warn

if TYPE_CHECKING:
    from mdnbench.reports.runs import Run

HTML_FILE = "report.html"

Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write one HTML file that needs no network, and no folder."),
]
Latex = Annotated[Path | None, typer.Option("--latex", metavar="FILE", help="Write the tables as LaTeX (booktabs).")]
Style = Annotated[
    str, typer.Option("--style", metavar="NAME", help="Of the figures: screen, or paper (serif, no titles).")
]
VHeadDim = Annotated[str | None, typer.Option("--v-head-dim", metavar="INTS", help="Value dimension V of a head.")]
Gates = Annotated[list[str] | None, typer.Option("--gates", metavar="NAMES", help="Gate profiles. Default: all.")]


@app.command()
def report(
    runs: arg.Runs,
    provider: arg.Provider = None,
    seq_len: arg.SeqLen = None,
    head_dim: arg.HeadDim = None,
    v_head_dim: VHeadDim = None,
    mode: arg.Modes = None,
    regime: arg.Regimes = None,
    gates: Gates = None,
    out: arg.ReportOut = None,
    html: Html = None,
    latex: Latex = None,
    style: Style = "screen",
    as_json: arg.Json = False,
) -> None:
    """Make tables, plots and the HTML page of runs.

    With --html or --latex and without --out, those files alone are written. The options from --provider to --gates
    choose rows, of which all of it is then made.
    """
    from mdnbench.reports.plots import check_style
    from mdnbench.reports.runs import is_report, load_runs

    from .results import results_path

    reports = [path for path in runs if is_report(path)]
    if len(reports) < len(runs):  # else the error of loading them says what is wrong
        runs = [path for path in runs if path not in reports]
        for path in reports:
            warn(f"{path} is passed over: it holds a report and no results")
    asked = {
        "--provider": provider, "--seq-len": seq_len, "--head-dim": head_dim, "--v-head-dim": v_head_dim,
        "--mode": mode, "--regime": regime, "--gates": gates,
    }  # fmt: skip
    with validating():
        check_style(style)
        loaded = complete(_kept(load_runs(runs), asked))
    files = {"--html": (html, _html), "--latex": (latex, _latex)}
    written = [_write(option, path, make(loaded)) for option, (path, make) in files.items() if path is not None]
    if out is None and not written:  # a run's own folder has the report of all its rows
        own = len(loaded) == 1 and not any(asked.values())
        out = results_path(runs[0]).parent if own else new_folder("report")
    try:
        show_reports(loaded, out, as_json, style, written)
    except OSError as fault:
        if isinstance(fault, BrokenPipeError):  # of whoever reads the table
            raise
        raise BadInput(f"--out {str(out)!r} cannot be written to ({fault.strerror}): choose another folder") from None


def _kept(runs: Sequence[Run], asked: Mapping[str, str | Sequence[str] | None]) -> list[Run]:
    """The runs with the rows that are asked for; without the runs that have none."""
    from .kept_rows import keeper

    keep = keeper(asked, [record for run in runs for record in run.records])
    found = [dataclasses.replace(run, records=list(filter(keep, run.records))) for run in runs]
    return [run for run in found if run.records]


def complete(runs: Sequence[Run]) -> list[Run]:
    """The runs with what older rows lack: counts of operations, and peaks of the device, of another of these runs or
    of this machine."""
    from .costs import with_costs
    from .peaks import with_peaks

    measured = [run.environment["peaks"] for run in runs if run.environment.get("peaks")]
    return [
        dataclasses.replace(run, records=with_costs(run.records), environment=with_peaks(run.environment, measured))
        for run in runs
    ]


def show_reports(
    runs: Sequence[Run], folder: Path | None, as_json: bool, style: str = "screen", written: Sequence[str] = ()
) -> None:
    """Write the reports of runs into `folder`, print the table, and say in one line where all is.

    Args:
        runs: what is reported.
        folder: made when absent; None means that nothing more is written.
        as_json: print rows for machines and nothing else.
        style: of the figures.
        written: files that were written before.
    """
    from mdnbench.reports import render, tables
    from mdnbench.reports.runs import ENVIRONMENT_FILE

    from .results import RESULTS_FILE

    saved = list(written)
    if folder is not None:
        there = [name for name in (RESULTS_FILE, ENVIRONMENT_FILE) if (folder / name).exists()]
        saved.insert(0, f"{folder}: {', '.join([*there, *write_reports(runs, folder, style)])}")
    if as_json:
        print(json.dumps(tables.to_rows(runs), indent=1, default=str))
        return
    console = make_console()
    render.show(console, runs)
    console.print(f"Saved in {'; '.join(saved)}", markup=False, soft_wrap=True)


def write_reports(runs: Sequence[Run], folder: Path, style: str = "screen") -> list[str]:
    """Write every report of `runs` into `folder`, which is made when absent. Returns the names of the files."""
    from mdnbench.reports import plots, render, tables

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(render.markdown(runs), encoding="utf-8")
    tables.to_frame(runs).to_csv(folder / "table.csv", index=False)
    (folder / HTML_FILE).write_text(_html(runs), encoding="utf-8")
    return ["table.md", "table.csv", HTML_FILE, *(path.name for path in plots.write_plots(runs, folder, style))]


def _html(runs: Sequence[Run]) -> str:
    from mdnbench.reports import html

    return html.page(runs)


def _latex(runs: Sequence[Run]) -> str:
    from mdnbench.reports import latex

    return latex.tables_of(runs)


def _write(option: str, path: Path, text: str) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as fault:
        raise BadInput(f"{option} {str(path)!r} cannot be written ({fault.strerror}): choose another file") from None
    return str(path)
