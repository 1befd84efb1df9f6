"""The command `mdnbench`: parse, validate all, run.

What the commands do is in other modules, imported where they are needed: help and reports load no torch.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import arguments as arg
from .console import ProgressDisplay, fail, make_console, warn

if TYPE_CHECKING:
    from mdnbench.reports.runs import Run

    from .spec import SweepSpec
    from .sweep import Progress

# Typer brings its own copy of click or uses the installed one, by version: this is the right class in both.
UsageError = typer.BadParameter.__mro__[1]
RUNS_FOLDER = Path("runs")
INTERRUPTED = 130  # as shells name an end by Ctrl-C

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Judge linear-attention kernels on speed, memory and correctness.",
)


class BadInput(UsageError):
    """Bad input that our own validation finds. The message names option, value and remedy."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2, with one line on standard error, for bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return app(args=arguments or ["--help"], prog_name="mdnbench", standalone_mode=False) or 0
    except BadInput as fault:
        fail(fault.format_message())
    except UsageError as fault:
        command = fault.ctx.command_path if fault.ctx else "mdnbench"
        fail(f"{fault.format_message().rstrip('.')}: {command} --help shows what there is")
    return 2


@contextmanager
def validating() -> Iterator[None]:
    """Turns the ValueErrors of validation into usage errors."""
    try:
        yield
    except ValueError as fault:
        raise BadInput(str(fault)) from None


@app.callback()
def before_every_command(version: arg.Version = False) -> None:
    """Takes the options that come before a command; --version answers by itself."""


@app.command()
def sweep(
    preset: arg.Preset = None,
    provider: arg.Provider = None,
    seq_len: arg.SeqLen = None,
    head_dim: arg.HeadDim = None,
    v_head_dim: arg.VHeadDim = None,
    chunk_size: arg.ChunkSize = None,
    batch: arg.Batch = None,
    heads: arg.Heads = None,
    value_heads: arg.ValueHeads = None,
    dtype: arg.Dtypes = None,
    mode: arg.Modes = None,
    regime: arg.Regimes = None,
    device: arg.SweepDevice = None,
    gates: arg.Gates = None,
    seed: arg.Seed = None,
    time_limit: arg.TimeLimit = None,
    name: arg.Name = None,
    out: arg.Out = None,
    resume: arg.Resume = False,
    dry_run: arg.DryRun = False,
    as_json: arg.Json = False,
) -> None:
    """Measure providers on a grid of workloads.

    Rows, tables and plots go to a run folder. Without options the preset smoke runs on what is there; options change
    the preset.
    """
    given = {
        "provider": provider, "seq_len": seq_len, "head_dim": head_dim, "v_head_dim": v_head_dim,
        "chunk_size": chunk_size, "batch": batch, "heads": heads, "value_heads": value_heads, "dtype": dtype,
        "mode": mode, "regime": regime, "device": device, "gates": gates, "seed": seed, "time_limit": time_limit,
        "name": name,
    }  # fmt: skip
    with validating():
        from . import options, views
        from .spec import estimate_seconds, plan

        spec = options.resumed_or_new_spec(out, resume, preset, given, planning=dry_run)
        points = plan(spec)
        folder = out or new_folder(spec.name)
        options.check_folder(folder, resume)
    if not dry_run:
        raise typer.Exit(_run_sweep(spec, folder, resume, len(points), as_json))
    try:
        options.device_name(spec.device)
    except ValueError as fault:
        warn(f"this is a plan for another machine: {fault}")
    if as_json:
        _print_json(
            {"provider": p.provider, **p.workload.to_dict(), "mode": p.mode, "regime": p.regime} for p in points
        )
    else:
        views.show_plan(make_console(), points, estimate_seconds(points, spec))


def _run_sweep(spec: SweepSpec, folder: Path, resume: bool, total: int, as_json: bool) -> int:
    """Run a sweep and report whatever was measured. Returns the exit code."""
    from mdnbench.reports.runs import load_runs

    from . import environment, views
    from .results import read_records, results_path
    from .sweep import run_sweep

    facts = environment.collect(spec.device)
    display = ProgressDisplay(total)

    def show(event: Progress) -> None:
        if mixed and display.done is None:  # the folder is of this sweep, and there is something to measure
            warn(f"rows of two states of the code will share {folder}: {mixed}")
        display.update(event.done, views.short(event.point), event.seconds_left)

    code, mixed = 0, None
    with validating():
        if resume:
            mixed = environment.code_difference(facts, folder)
        else:
            environment.write(facts, folder)
    try:
        with display:
            run_sweep(spec, folder, resume, show, environment.identity(facts))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except RuntimeError as fault:  # no worker process comes up
        fail(f"{fault}; see {folder}/worker.log")
        code = 1
    except ValueError as fault:
        if display.done is not None:  # points have run: this does not speak of the input, it is a fault of ours
            raise
        raise BadInput(str(fault)) from None
    measured = results_path(folder).exists() and read_records(folder)
    runs = load_runs([folder]) if measured else []
    if runs:
        _report(runs, folder, as_json)
    if code == INTERRUPTED:
        kept = sum(len(run.records) for run in runs)  # rows on disk: one may have been written without being shown
        resume_command = f"mdnbench sweep --resume --out {shlex.quote(str(folder))}"
        fail(f"stopped after {kept} of {total} points; go on with: {resume_command}")
    return code


@app.command("list")
def list_providers(provider: arg.Provider = None, device: arg.Device = "auto", as_json: arg.Json = False) -> None:
    """List providers and what they support here.

    One block an operator; a provider that does not run here says why.
    """
    with validating():
        from . import options, views
        from .listing import capabilities

        chosen = options.select_providers(provider)
        kind = options.device_name(device).partition(":")[0]
    found = [capabilities(provider, kind) for provider in chosen.values()]
    if as_json:
        _print_json(dataclasses.asdict(row) for row in found)
    else:
        views.show_capabilities(make_console(), found)


@app.command()
def check(
    provider: arg.Provider = None,
    gates: arg.GateProfiles = None,
    dtype: arg.Dtype = "auto",
    device: arg.Device = "auto",
    as_json: arg.Json = False,
) -> None:
    """Check providers at every gate profile; time nothing.

    Output and gradients are compared with float64. The exit code is 1 when something is wrong.
    """
    with validating():
        from . import options, views
        from .check import check_profiles

        place = options.device_name(device)
        points = options.check_points(provider, gates, dtype, place)
    records = []
    with ProgressDisplay(len(points)) as display:
        for record in check_profiles(points, place):
            records.append(record)
            display.update(len(records), f"{record.point.provider} {record.point.workload.gates}")
    if as_json:
        _print_json(record.to_row() for record in records)
    else:
        views.show_checks(make_console(), records)
    raise typer.Exit(any(record.status not in ("ok", "unsupported") for record in records))


@app.command()
def report(runs: arg.Runs, out: arg.ReportOut = None, as_json: arg.Json = False) -> None:
    """Make tables and plots again, from one run or several."""
    from mdnbench.reports.runs import is_report, load_runs

    from .results import results_path

    reports = [path for path in runs if is_report(path)]
    if len(reports) < len(runs):  # else the error of loading them says what is wrong
        runs = [path for path in runs if path not in reports]
        for path in reports:
            warn(f"{path} is passed over: it holds a report and no results")
    with validating():
        loaded = load_runs(runs)
    if out is None:
        out = new_folder("report") if len(loaded) > 1 else results_path(runs[0]).parent
    try:
        _report(loaded, out, as_json)
    except OSError as fault:
        if isinstance(fault, BrokenPipeError):  # of whoever reads the table
            raise
        raise BadInput(f"--out {str(out)!r} cannot be written to ({fault.strerror}): choose another folder") from None


@app.command("doctor")
def run_doctor(as_json: arg.Json = False) -> None:
    """Show versions and what is wrong with them.

    Known-bad combinations of hardware, driver and versions come with what they mean and the remedy.
    The exit code is 1 when results would be wrong or a GPU stays out of use.
    """
    from . import doctor, environment, views

    found = environment.collect()
    findings = doctor.diagnose(found)
    if as_json:
        rows = [{"name": it.name, "level": it.level, "means": it.means, "remedy": it.remedy} for it in findings]
        _print_json(rows)
    else:
        views.show_doctor(make_console(), doctor.facts(found), findings)
    raise typer.Exit(any(rule.level == "error" for rule in findings))


def _report(runs: Sequence[Run], folder: Path, as_json: bool) -> None:
    """Write the reports of runs into `folder`, print the table, and say in one line where all is."""
    from mdnbench.reports import render, tables
    from mdnbench.reports.runs import ENVIRONMENT_FILE

    from .results import RESULTS_FILE

    written = [name for name in (RESULTS_FILE, ENVIRONMENT_FILE) if (folder / name).exists()]
    written += write_reports(runs, folder)
    if as_json:
        _print_json(tables.to_rows(runs))
        return
    console = make_console()
    render.show(console, runs)
    console.print(f"Saved in {folder}: {', '.join(written)}", markup=False, soft_wrap=True)


def write_reports(runs: Sequence[Run], folder: Path) -> list[str]:
    """Write every report of `runs` into `folder`, which is made when absent. Returns the names of the files."""
    from mdnbench.reports import plots, render, tables

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(render.markdown(runs), encoding="utf-8")
    tables.to_frame(runs).to_csv(folder / "table.csv", index=False)
    return ["table.md", "table.csv", *(path.name for path in plots.write_plots(runs, folder))]


def new_folder(name: str) -> Path:
    """Where a run goes by default: runs/<time>-<name>."""
    return RUNS_FOLDER / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


def _print_json(rows: Iterable[Any]) -> None:
    print(json.dumps(list(rows), indent=1, default=str))


from . import cli_regress, cli_track  # noqa: E402, F401 - their commands are registered on app, which has to be there
