"""The command `mdnbench`: parse, validate all, run.

What the commands do is in other modules, imported where they are needed: help and reports load no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
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
    # CUDA would number GPUs by speed; so "cuda:1" is what nvidia-smi and NVML call 1.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
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
    min_time: arg.MinTime = None,
    precision: arg.Precision = None,
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
        "min_time": min_time, "precision": precision, "name": name,
    }  # fmt: skip
    with validating():
        from . import options, views
        from .listing import refused_chunk_sizes
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
    for sentence in refused_chunk_sizes(points):
        warn(sentence)
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
    from .cli_report import complete, show_reports
    from .peaks import with_peaks
    from .results import read_records, results_path
    from .sweep import run_sweep

    facts = with_peaks(environment.collect(spec.device))
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
    runs = complete(load_runs([folder])) if measured else []
    if runs:
        show_reports(runs, folder, as_json)
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


def new_folder(name: str) -> Path:
    """Where a run goes by default: runs/<time>-<name>."""
    return RUNS_FOLDER / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


def _print_json(rows: Iterable[Any]) -> None:
    print(json.dumps(list(rows), indent=1, default=str))


from . import cli_check, cli_peaks, cli_profile, cli_regress, cli_report, cli_track, cli_tune  # noqa: E402, F401 - their commands are registered on app, which has to be there
