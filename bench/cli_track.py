"""The commands `mdnbench inspect` and `mdnbench track`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import arguments as arg
from .cli import BadInput, app, validating
from .console import fail, make_console, print_item, print_table

HISTORY_FILE = "history.jsonl"
ERROR = 4  # of what cannot be done for another reason than bad input, as of mdnbench gate

Target = Annotated[str, typer.Option("--target", metavar="ARCH", help="What is compiled for: sm_80, sm_89 or sm_90.")]
InspectOut = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the inspection as JSON, for mdnbench gate --static.")
]
TrackedRuns = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RUN...]", help="Runs to add: folders, or results.jsonl files. None: only show."),
]
History = Annotated[Path, typer.Option("--history", metavar="FILE", help="The history, which is appended to.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw each point's history: .png, .svg or .pdf.")
]
Commit = Annotated[
    str | None,
    typer.Option("--commit", metavar="SHA", help="The commit that was measured. Default: mdnbench's own, of the run."),
]


@app.command("inspect")
def inspect_kernels(target: Target = "sm_90", out: InspectOut = None, as_json: arg.Json = False) -> None:
    """Compile the kernels for a GPU that is not here.

    Registers, spills, shared memory, programs a multiprocessor, and machine instructions by class, for every shipped
    configuration. The same code, Triton and ptxas give the same figures.
    """
    from . import inspection

    with validating():
        inspection.get_target(target)
    try:
        found = inspection.inspect(target)
    except RuntimeError as fault:
        fail(str(fault))
        raise typer.Exit(ERROR) from None
    text = inspection.to_json(found)
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
        except OSError as fault:
            raise BadInput(f"--out {str(out)!r} cannot be written ({fault.strerror}): choose another file") from None
    if as_json:
        print(text, end="")
        return
    console = make_console()
    print_table(console, *inspection.table(found))
    for case, reason in found["unsupported"].items():
        print_item(console, f"{case} is not supported: {reason}")
    saved = f". Saved in {out}" if out else ""
    versions = f"for {found['target']} by Triton {found['triton']}, ptxas {found['ptxas']}"
    console.print(f"{len(found['launches'])} launches compiled {versions}{saved}", markup=False, soft_wrap=True)


@app.command()
def track(
    runs: TrackedRuns = None,
    history: History = Path(HISTORY_FILE),
    plot: Plot = None,
    commit: Commit = None,
    as_json: arg.Json = False,
) -> None:
    """Keep a history of runs over commits, and find where times step.

    Points are kept apart by device, driver, Triton and torch. The exit code is 0 whatever is found: to judge a change
    of the code use mdnbench gate.
    """
    from mdnbench.reports import history as report
    from mdnbench.reports.runs import load_runs

    from . import history as kept

    with validating():
        if not runs and not history.exists():
            raise BadInput(f"--history {str(history)!r} does not exist: name a RUN to begin it with")
        if plot is not None:
            report.check_plot_file(plot)  # before anything is kept
        new = []
        for run in load_runs(runs or []):
            try:
                new += kept.entries_of(run.records, run.environment, commit)
            except ValueError as fault:
                raise BadInput(f"RUN {run.name!r}: {fault}") from None
        added = kept.append(history, new) if runs else 0
        series = kept.series_of(kept.read(history))
        if plot is not None:
            report.write_plot(series, plot)
    if as_json:
        print(json.dumps(report.to_json(series), indent=1))
        return
    console = make_console()
    header, rows = report.step_rows(series)
    if rows:
        print_table(console, header, rows)
    known = len(new) - added
    parts = [f"{added} rows added to {history}" + (f", {known} were there" if known else "")] if runs else []
    parts.append(f"{len(series)} series, {len(rows)} step{'' if len(rows) == 1 else 's'}")
    parts += [f"plot in {plot}"] if plot else []
    console.print("; ".join(parts), markup=False, soft_wrap=True)
