"""The command `mdnbench profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import arguments as arg
from .cli import BadInput, app, new_folder, validating
from .console import fail, make_console, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from .profiling import Profile
    from .results import Point

PROFILE_FILE = "profile.json"
MOST_KERNELS = 12  # in the table on the terminal; the file has all
LIMIT_S = 3600.0  # of one provider: what hangs ends at last

SIZES = {"--seq-len": "2048", "--head-dim": "64", "--chunk-size": "64", "--batch": "1", "--heads": "4"}  # of no preset


def _size(option: str, meaning: str) -> Any:
    return Annotated[str | None, typer.Option(option, metavar="INT", help=f"{meaning} Default: {SIZES[option]}.")]


Providers = Annotated[
    list[str], typer.Argument(metavar="PROVIDER...", help="Providers, or operators for all of theirs: mdn-torch,gdn.")
]
Mode = Annotated[str, typer.Option("--mode", metavar="NAME", help="forward, backward or forward_backward.")]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Shape of a preset of mdnbench sweep, where it lists several the last; sizes given beside it change it.",
    ),
]
SeqLen = _size("--seq-len", "Tokens a sequence.")
HeadDim = _size("--head-dim", "Key dimension K of a head.")
VHeadDim = Annotated[str | None, typer.Option("--v-head-dim", metavar="INT", help="Value dimension V. Default: K.")]
ChunkSize = _size("--chunk-size", "Tokens a chunk.")
Batch = _size("--batch", "Sequences.")
Heads = _size("--heads", "Query and key heads.")
Calls = Annotated[str, typer.Option("--calls", metavar="INT", help="How many calls are recorded.")]
ProfileOut = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Folder of the traces. Default: runs/<time>-profile.")
]


@app.command("profile")
def profile_providers(
    providers: Providers,
    preset: Preset = None,
    seq_len: SeqLen = None,
    head_dim: HeadDim = None,
    v_head_dim: VHeadDim = None,
    chunk_size: ChunkSize = None,
    batch: Batch = None,
    heads: Heads = None,
    value_heads: arg.ValueHeads = None,
    mode: Mode = "forward",
    dtype: arg.Dtype = "auto",
    device: arg.Device = "auto",
    gates: arg.Gates = None,
    calls: Calls = "10",
    out: ProfileOut = None,
    as_json: arg.Json = False,
) -> None:
    """Show where the time of a call goes.

    Kernels by time, launches, gaps and allocations, by torch.profiler; a bar a provider by stage, and the Chrome
    traces, for Perfetto. Calls follow one another without emptying the cache. Each provider runs in a process of its
    own. The exit code is 1 when one failed.
    """
    with validating():
        from mdnbench.baselines.workload import Workload

        from . import options, parse
        from .requests import PointFailed
        from .results import MODES, Point
        from .sweep import WORKER_LOG

        place = options.device_name(device)
        kind = place.partition(":")[0]
        given = {
            "--seq-len": seq_len, "--head-dim": head_dim, "--v-head-dim": v_head_dim or head_dim,
            "--chunk-size": chunk_size, "--batch": batch, "--heads": heads,
            "--value-heads": heads if value_heads is None else value_heads,
        }  # fmt: skip
        sizes = _sizes_of(preset) | {name: text for name, text in given.items() if text is not None}
        groups, spread = (parse.parse_int(name, sizes[name]) for name in ("--heads", "--value-heads"))
        options.check_value_heads(groups, spread)
        chosen_mode = _one(parse.parse_choices("--mode", [mode], MODES), "--mode", mode)
        workload = Workload(
            seq_len=_one(parse.parse_ints("--seq-len", sizes["--seq-len"]), "--seq-len", sizes["--seq-len"]),
            head_dim_k=parse.parse_int("--head-dim", sizes["--head-dim"]),
            head_dim_v=parse.parse_int("--v-head-dim", sizes["--v-head-dim"]),
            batch=parse.parse_int("--batch", sizes["--batch"]),
            heads=groups,
            value_heads=spread,
            chunk_size=parse.parse_int("--chunk-size", sizes["--chunk-size"]),
            dtype=options.one_dtype(dtype, place),
            device=kind,
            gates=options.parse_gates(gates) if gates else "mild",
        )
        count = parse.parse_int("--calls", calls)
        selected = options.select_providers(providers, "PROVIDER")
        folder = out or new_folder("profile")
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--out {str(folder)!r} is a file: give a folder")
    found, reasons, failed = [], [], False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise BadInput(f"--out {str(folder)!r} cannot be made ({fault.strerror}): choose another folder") from None
    for provider in selected.values():
        its = workload if provider.chunk_sizes is not None else workload.with_(chunk_size=None)
        reason = provider.supports(its, chosen_mode)
        if reason is not None:
            reasons.append(f"{provider.name}: {reason}")
            continue
        try:
            found.append(_record(Point(provider.name, its, chosen_mode, "eager"), place, count, folder))
        except PointFailed as stop:  # its line says so, the others have theirs
            reasons.append(f"{provider.name} failed: {stop.failure.reason}")
            failed = True
        except RuntimeError as fault:  # no process comes up
            reasons.append(f"{provider.name} failed: {fault}")
            failed = True
    for reason in reasons:
        fail(reason)
    if failed:
        fail(f"what the providers printed is in {folder / WORKER_LOG}")
    if found:
        _save_and_show(found, folder, as_json)
    raise typer.Exit(failed or not found)


def _record(point: Point, device: str, calls: int, folder: Path) -> Profile:
    """The profile of a point, recorded in a process that ends with it: what a provider does to its process, such as
    importing another package by the name of an installed one, concerns no other provider."""
    from .requests import Trace
    from .sweep import WORKER_LOG
    from .worker import Worker

    worker = Worker(device, folder / WORKER_LOG)
    try:
        return worker.trace(Trace(point, calls, folder / f"trace-{point.provider}.json.gz"), LIMIT_S)
    finally:
        worker.stop()


def _sizes_of(preset: str | None) -> dict[str, str]:
    """The sizes of a preset, where it lists several the last, as the texts of options; those of `SIZES` for None."""
    from .presets import load_preset

    if preset is None:
        return {**SIZES, "--v-head-dim": SIZES["--head-dim"], "--value-heads": SIZES["--heads"]}
    values = load_preset(preset)
    key_dim, value_dim = values["head_dims"][-1]
    sizes = {
        "--seq-len": values["seq_lens"][-1], "--head-dim": key_dim, "--v-head-dim": value_dim,
        "--chunk-size": values["chunk_sizes"][-1], "--batch": values["batch"], "--heads": values["heads"],
        "--value-heads": values.get("value_heads", values["heads"]),
    }  # fmt: skip
    return {name: str(size) for name, size in sizes.items()}


def _one(values: tuple[Any, ...], option: str, text: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"{option} {text!r}: a profile has one workload, so give one; mdnbench sweep takes several")
    return values[0]


def _save_and_show(found: list[Profile], folder: Path, as_json: bool) -> None:
    from mdnbench.reports import stages

    rows = [it.to_dict() for it in found]
    (folder / PROFILE_FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    files = [PROFILE_FILE, *(path.name for path in stages.write_plots(rows, folder))]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    console = make_console()
    for profile in found:
        _show(console, profile)
    traces = ", ".join(f"trace-{it.provider}.json.gz" for it in found)
    console.print(f"Saved in {folder}: {', '.join(files)}, {traces}", markup=False, soft_wrap=True)


def _show(console: Console, profile: Profile) -> None:
    launches = "launches" if profile.device == "cuda" else "operators"
    gaps = "idle between kernels" if profile.device == "cuda" else "outside of operators"
    console.print(
        f"{profile.provider}, {profile.mode}: {profile.span_ms:.4g} ms a call, of which {profile.idle_ms:.3g} ms "
        f"({profile.idle_ms / profile.span_ms:.0%}) {gaps}; {profile.launches:.4g} {launches}, "
        f"{profile.allocated_bytes / 2**20:.4g} MiB allocated",
        markup=False,
        soft_wrap=True,
    )
    total = sum(kernel.ms for kernel in profile.kernels)
    rows = [
        (_short(it.name), it.stage, f"{it.launches:.4g}", f"{it.ms:.4g}", f"{it.ms / total:.1%}")
        for it in profile.kernels[:MOST_KERNELS]
    ]
    print_table(console, ("kernel" if profile.device == "cuda" else "operator", "stage", "a call", "ms", "part"), rows)
    if len(profile.kernels) > MOST_KERNELS:
        console.print(f"  and {len(profile.kernels) - MOST_KERNELS} more: see {PROFILE_FILE}")
    console.print()


def _short(name: str) -> str:
    """The name of a kernel without the template arguments that fill lines in C++."""
    return name if len(name) <= 70 else f"{name[:67]}..."
