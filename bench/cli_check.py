"""The command `mdnbench check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import arguments as arg
from .cli import BadInput, app, validating
from .console import ProgressDisplay, make_console

if TYPE_CHECKING:
    from .results import Record

Profiles = Annotated[
    list[str] | None,
    typer.Option("--profiles", metavar="NAMES", help="As --gates; shows a heat map with the error of every tensor."),
]
CheckOut = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Keep the checks as a run, for mdnbench report.")
]
Markdown = Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write the heat map as Markdown.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one HTML page that needs no network.")]


@app.command()
def check(
    provider: arg.Provider = None,
    gates: arg.GateProfiles = None,
    profiles: Profiles = None,
    dtype: arg.Dtype = "auto",
    device: arg.Device = "auto",
    out: CheckOut = None,
    markdown: Markdown = None,
    html: Html = None,
    as_json: arg.Json = False,
) -> None:
    """Check providers at every gate profile; time nothing.

    Output and gradients are compared with float64. The exit code is 1 when something is wrong.
    """
    with validating():
        from mdnbench.reports import accuracy
        from mdnbench.reports import html as pages
        from mdnbench.reports.runs import Run

        from . import environment, options, views
        from .check import check_profiles
        from .results import append_record

        if gates and profiles:
            raise BadInput("--profiles and --gates both name gate profiles: use one of them")
        place = options.device_name(device)
        points = options.check_points(
            provider, gates or profiles, dtype, place, option="--profiles" if profiles else "--gates"
        )
        if out is not None:
            options.check_folder(out, resume=False)
    facts = environment.collect(place) if out or markdown or html else {}
    if out is not None:
        with validating():
            environment.write(facts, out)
    records: list[Record] = []
    with ProgressDisplay(len(points)) as display:
        for record in check_profiles(points, place):
            records.append(record)
            if out is not None:
                append_record(out, record)
            display.update(len(records), f"{record.point.provider} {record.point.workload.gates}")
    run = Run(out.name if out else "check", records, facts)
    if as_json:
        print(json.dumps([record.to_row() for record in records], indent=1))
    elif profiles:
        accuracy.show(make_console(), [run])
    else:
        views.show_checks(make_console(), records)
    _write("--markdown", markdown, accuracy.markdown([run]))
    _write("--html", html, pages.page([run]) if html else "")
    raise typer.Exit(any(record.status not in ("ok", "unsupported") for record in records))


def _write(option: str, path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as fault:
        raise BadInput(f"{option} {str(path)!r} cannot be written ({fault.strerror}): choose another file") from None
