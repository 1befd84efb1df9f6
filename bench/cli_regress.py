"""The commands `mdnbench compare` and `mdnbench gate`."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import arguments as arg
from .cli import BadInput, app, new_folder, validating
from .console import ProgressDisplay, fail, make_console
from .parse import parse_percent

if TYPE_CHECKING:
    from .gate import Gate
    from .regress import Comparison
    from .results import Record

ERROR = 4  # of a gate that comes to no verdict; 2 is bad input
INTERRUPTED = 130
GATE_PRESET = "ci"
THRESHOLD = "3%"
GATE_TIME_LIMIT_S = 0.25  # of sampling a point in a block
GATE_PRECISION = 0.001  # hardly reached in this time: both sides are sampled for as long

RunA = Annotated[Path, typer.Argument(metavar="RUN_A", help="The base: a run folder, or a results.jsonl.")]
RunB = Annotated[Path, typer.Argument(metavar="RUN_B", help="The head, which is compared with it.")]
Repeat = Annotated[
    bool,
    typer.Option(
        "--repeat", help="Both are the same sweep of the same code: how many medians agree within --threshold?"
    ),
]
Threshold = Annotated[
    str, typer.Option("--threshold", metavar="PERCENT", help="Smaller differences do not matter: 3% or 0.03.")
]
Markdown = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write the comparison as Markdown, for a comment.")
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="REV", help="The revision to compare with: a commit, branch or tag.")
]
Head = Annotated[
    str | None,
    typer.Option("--head", metavar="REV", help="The revision that is judged. Default: the working tree, as it is."),
]
GatePreset = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help=f"What is measured, as in mdnbench sweep. Default: {GATE_PRESET}."),
]
GateThreshold = Annotated[
    str | None,
    typer.Option(
        "--threshold",
        metavar="PERCENT",
        help=f"Smaller differences do not matter: 3% or 0.03. Default: {THRESHOLD}; of --static, for instructions, 5%.",
    ),
]
Blocks = Annotated[
    str | None,
    typer.Option(
        "--blocks",
        metavar="INT",
        help="Pairs of blocks in a round; up to 3 rounds. Default: as many as one slow point needs, 12 or more.",
    ),
]
GateTimeLimit = Annotated[
    str | None,
    typer.Option(
        "--time-limit",
        metavar="SECONDS",
        help=f"Of sampling a point in a block, at most. Default: {GATE_TIME_LIMIT_S}.",
    ),
]
GateOut = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Folder of the blocks. Default: runs/<time>-gate.")
]
Static = Annotated[
    bool,
    typer.Option("--static", help="Compare the compiled kernels in place of times: needs no GPU and is exact."),
]
Target = Annotated[
    str | None, typer.Option("--target", metavar="ARCH", help="Of --static: what is compiled for, such as sm_90.")
]


@app.command()
def compare(
    run_a: RunA,
    run_b: RunB,
    threshold: Threshold = THRESHOLD,
    repeat: Repeat = False,
    markdown: Markdown = None,
    as_json: arg.Json = False,
) -> None:
    """Compare two runs, point by point.

    Ratio of the medians with its interval, a verdict, and what changed in memory and error. The exit code is 0
    whatever the verdicts: to judge a change of the code use mdnbench gate.
    """
    with validating():
        from mdnbench.reports.runs import load_run

        from . import environment
        from .quality import clocks_between
        from .regress import Comparison, compare_records

        part = parse_percent("--threshold", threshold)
        runs = [load_run(path) for path in (run_a, run_b)]
    if repeat:
        return _show_agreement(runs[0].records, runs[1].records, part, markdown, as_json)
    changes, untimed = compare_records(runs[0].records, runs[1].records, part)
    before, after = (environment.identity(run.environment) for run in runs)
    notes = [
        f"Measured with different {name}: {before.get(name)} and {after.get(name)}."
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    notes += clocks_between(runs[0].records, runs[1].records)
    notes.append("Intervals cover the samples of these two processes, not how processes differ from one another.")
    _show(Comparison(str(run_a), str(run_b), part, changes, untimed, notes), markdown, as_json)


@app.command()
def gate(
    base: Base = None,
    head: Head = None,
    preset: GatePreset = None,
    provider: arg.Provider = None,
    device: arg.SweepDevice = None,
    threshold: GateThreshold = None,
    blocks: Blocks = None,
    time_limit: GateTimeLimit = None,
    out: GateOut = None,
    markdown: Markdown = None,
    static: Static = False,
    target: Target = None,
    as_json: arg.Json = False,
) -> None:
    """Is this code slower than a base revision?

    Installs both revisions of the repository of this folder, measures them in turn in fresh processes, and compares
    pairs of neighbours. With --static it compiles the code that this command is of. Exit code: 0 same or faster; 1
    slower, gone or more memory; 3 undecided; 4 no verdict.
    """
    if static:
        timed = {
            "--preset": preset, "--provider": provider, "--device": device, "--blocks": blocks,
            "--time-limit": time_limit, "--out": out, "--json": as_json or None,
        }  # fmt: skip
        with validating():
            part = None if threshold is None else parse_percent("--threshold", threshold)
            if head is not None:
                raise BadInput("--static judges the code as it is here: leave --head out")
            for name, value in timed.items():
                if value is not None:
                    raise BadInput(f"{name} is of a gate by times: leave it out, or --static")
            _write_unfinished(markdown)
        raise typer.Exit(_run_static(base, target, part, markdown))
    with validating():
        from . import options, parse
        from .gate import ANY_PROVIDER, Gate
        from .presets import load_preset, make_spec

        if base is None:
            raise BadInput("--base is missing: name the revision to compare with, such as --base main")
        if head == "":
            raise BadInput("--head '' is empty: leave it out for the working tree")
        if provider is not None and not parse.split_names(provider):
            raise BadInput(f"--provider {','.join(provider)!r} is empty: leave it out for all")
        if target is not None:
            raise BadInput("--target goes with --static")
        part = parse_percent("--threshold", THRESHOLD if threshold is None else threshold)
        pairs = None if blocks is None else parse.parse_int("--blocks", blocks, least=2)
        seconds = GATE_TIME_LIMIT_S if time_limit is None else parse.parse_seconds("--time-limit", time_limit)
        values = load_preset(GATE_PRESET if preset is None else preset)
        values |= {"name": "gate", "providers": list(ANY_PROVIDER)}
        values |= {"time_limit_s": seconds, "precision": GATE_PRECISION}
        values |= {"device": device} if device else {}
        spec = make_spec(values, options.torch.cuda.device_count())
        folder = out or new_folder("gate")
        options.check_folder(folder, resume=False)
        _write_unfinished(markdown)
    raise typer.Exit(_run_gate(Gate(Path.cwd(), base, head, spec, provider, part, pairs), folder, markdown, as_json))


def _run_gate(wanted: Gate, folder: Path, markdown: Path | None, as_json: bool) -> int:
    from . import environment
    from .gate import GateProgress, run_gate
    from .revisions import GateError

    display: list[ProgressDisplay] = []  # one, from the first block on: before, nobody knows how many there are

    def show(event: GateProgress) -> None:
        if not event.total:
            print(event.step, file=sys.stderr, flush=True)
            return
        if not display:
            display.append(stack.enter_context(ProgressDisplay(event.total)))
        display[0].total = event.total
        display[0].update(event.done, f"block of {event.step}", event.seconds_left)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing stays behind
    try:
        with ExitStack() as stack:
            found = run_gate(wanted, folder, environment.collect(wanted.spec.device), show)
    except GateError as fault:
        return _no_verdict(str(fault), markdown)
    except KeyboardInterrupt:
        fail(f"stopped; the blocks so far are in {folder}")
        return INTERRUPTED
    except Exception as fault:
        return _own_fault(fault, markdown)
    _show(found, markdown or folder / "gate.md", as_json)
    return found.exit_code


def _run_static(base: str | None, target: str | None, threshold: float | None, markdown: Path | None) -> int:
    from .static_gate import run_static_gate

    given = {"target": target, "threshold": threshold}
    try:
        code, text = run_static_gate(base, **{name: value for name, value in given.items() if value is not None})
    except Exception as fault:
        return _own_fault(fault, markdown)
    if code == ERROR:
        return _no_verdict(text, markdown)
    print(text)
    if markdown is not None:
        _write(markdown, text + "\n")
    return code


def _write_unfinished(markdown: Path | None) -> None:
    """Say so until there is a verdict, and find out before anything is measured whether the file can be written."""
    _write_no_verdict("the gate has not ended.", markdown)


def _own_fault(fault: Exception, markdown: Path | None) -> int:
    """A fault of the gate itself: left to Python, its exit code 1 would say that the head is slower."""
    traceback.print_exception(fault)
    return _no_verdict(f"{type(fault).__name__}: {fault}", markdown)


def _no_verdict(reason: str, markdown: Path | None) -> int:
    fail(reason)
    _write_no_verdict(reason, markdown)
    return ERROR


def _write_no_verdict(reason: str, markdown: Path | None) -> None:
    if markdown is not None:  # a comment on a change has to say so too
        _write(markdown, f"**No verdict:** {reason}\n")


def _show_agreement(
    first: Sequence[Record], second: Sequence[Record], limit: float, markdown: Path | None, as_json: bool
) -> None:
    from mdnbench.reports import agreement

    _report(agreement, agreement.agreement(first, second, limit), markdown, as_json)


def _show(found: Comparison, markdown: Path | None, as_json: bool) -> None:
    from mdnbench.reports import compare

    _report(compare, found, markdown, as_json)


def _report(report: ModuleType, found: Any, markdown: Path | None, as_json: bool) -> None:
    """What was found, by its module in reports: to a Markdown file, and for people or as JSON."""
    if as_json:
        print(json.dumps(report.to_json(found), indent=1))
    else:
        report.show(make_console(), found)
    if markdown is not None:
        _write(markdown, report.markdown(found))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as fault:
        raise BadInput(f"--markdown {str(path)!r} cannot be written ({fault.strerror}): choose another file") from None
