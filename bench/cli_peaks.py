"""The command `mdnbench peaks`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import arguments as arg
from .cli import app, validating
from .console import ProgressDisplay, make_console, print_table, warn

Again = Annotated[bool, typer.Option("--again", help="Measure although this device and driver are stored.")]


@app.command("peaks")
def show_peaks(device: arg.Device = "auto", again: Again = False, as_json: arg.Json = False) -> None:
    """Measure what this machine reaches at best.

    Copy bandwidth, and the rate of matrix products by dtype, once a device and driver: the ceilings of the roofline and
    of the column "% roof" of every later report.
    """
    with validating():
        from . import environment, options, peaks

        place = options.device_name(device)
    facts = environment.collect(place)
    found = None if again else peaks.load(facts)
    stored = "stored before; --again measures anew"
    if found is None:
        kind = place.partition(":")[0]
        dtypes = len(peaks.MATMUL_DTYPES[kind]) + (kind == "cuda")
        with ProgressDisplay(1 + dtypes * len(peaks.MATMUL_SIZES[kind])) as display:
            cases: list[str] = []

            def begun(case: str) -> None:
                display.update(len(cases), case)
                cases.append(case)

            found = peaks.measure_peaks(facts, place, begun)
        try:
            stored = f"stored in {peaks.store(found)}"
        except OSError as fault:
            stored = "not stored"
            warn(f"the peaks cannot be stored ({fault.strerror}): set XDG_CACHE_HOME to a folder that can be written")
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = make_console()
    rows = [("copy, bytes read and written", f"{found['copy_bytes_per_s'] / 1e9:.4g} GB/s")]
    rows += [
        (f"matrix product, {name}", f"{rate / 1e12:.4g} TFLOP/s") for name, rate in found["matmul_flops_per_s"].items()
    ]
    print_table(console, None, rows)
    threads = f", {found['threads']} threads" if found["threads"] else f", driver {found['driver']}"
    console.print(f"{found['device_name']}{threads}, {found['time']}; {stored}", markup=False, soft_wrap=True)
