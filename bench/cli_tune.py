"""The command `mdnbench tune`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import arguments as arg
from .cli import INTERRUPTED, RUNS_FOLDER, BadInput, app, new_folder, validating
from .console import fail, make_console

if TYPE_CHECKING:
    from mdnbench.baselines.workload import Workload

    from .tune_log import Choice, TuneLog
    from .tune_views import TuneDisplay

OPERATORS = ("mdn",)
PRESETS = "paper-400m,paper-1.3b,ci-gpu,long-context"
RUN_NAME = "tune"
_TAKES = {"--show": (), "--verify": ("--jobs",), "--export": ("--out",)}  # of the options of a search
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}

Operator = Annotated[str, typer.Option("--operator", metavar="NAME", help="Whose kernels: mdn.")]
Shapes = Annotated[
    str | None,
    typer.Option("--shapes", metavar="PRESETS", help=f"Presets whose shapes are tuned. Default: {PRESETS}."),
]
Budget = Annotated[
    str | None,
    typer.Option("--budget", metavar="TIME", help="For all shapes together: 90s, 10m, 1h. Default: no limit."),
]
Jobs = Annotated[str | None, typer.Option("--jobs", metavar="INT", help="Compilers at a time. Default: one a core.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the search in --out, or with the newest one.")]
Show = Annotated[bool, typer.Option("--show", help="Show what is used for each shape and where it comes from.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check what is in use, and time it against its runner-ups.")]
Export = Annotated[
    bool, typer.Option("--export", help="Copy what was tuned here to kernels/tuned, or --out, to be shipped.")
]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="cuda or cuda:N. Default: cuda.")]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="float32, float16 or bfloat16.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Folder of the search. Default: runs/<time>-tune.")
]


@app.command()
def tune(
    operator: Operator = "mdn",
    shapes: Shapes = None,
    batch: arg.Batch = None,
    heads: arg.Heads = None,
    value_heads: arg.ValueHeads = None,
    seq_len: arg.SeqLen = None,
    head_dim: arg.HeadDim = None,
    v_head_dim: arg.VHeadDim = None,
    chunk_size: arg.ChunkSize = None,
    dtype: Dtype = None,
    device: Device = None,
    budget: Budget = None,
    jobs: Jobs = None,
    out: Out = None,
    resume: Resume = False,
    show: Show = False,
    verify: Verify = False,
    export: Export = False,
) -> None:
    """Find the kernel configurations that are fast and right on this GPU.

    Sizes given as options change the shapes of --shapes. What is chosen is kept in the user's cache, and used from then
    on. The exit code is 1 when for a shape nothing is right.
    """
    given = {
        "batch": batch, "heads": heads, "value_heads": value_heads, "seq_len": seq_len, "head_dim": head_dim,
        "v_head_dim": v_head_dim, "chunk_size": chunk_size, "dtype": dtype,
    }  # fmt: skip
    with validating():
        if operator not in OPERATORS:
            raise BadInput(f"--operator {operator!r} has no kernels to tune: choose from {', '.join(OPERATORS)}")
        asked = [name for name, value in (("--show", show), ("--verify", verify), ("--export", export)) if value]
        others = {"--resume": resume or None, "--budget": budget, "--jobs": jobs, "--out": out}
        if asked:
            asked += [name for name, value in others.items() if value is not None and name not in _TAKES[asked[0]]]
        if len(asked) > 1:
            raise BadInput(f"{asked[0]} and {asked[1]}: give one of them")
        workloads = shapes_of(shapes, given)
        seconds = None if budget is None else parse_duration("--budget", budget)
        workers = _jobs(jobs)
    if show:
        raise typer.Exit(_show(workloads, device))
    if export:
        raise typer.Exit(_export(workloads, device, out))
    with validating():
        place = _gpu(device)
    raise typer.Exit(
        _verify(workloads, place, workers) if verify else _tune(workloads, place, seconds, workers, out, resume)
    )


def shapes_of(presets: str | None, given: dict[str, Any]) -> list[Workload]:
    """The workloads to tune, each once for what the store tells apart.

    Args:
        presets: names with commas; None means `PRESETS`, or the first of them where sizes are given.
        given: options of a sweep by name, None where not given.

    Raises:
        ValueError: for bad input, naming the option.
    """
    from mdnbench.baselines.registry import get_provider

    from . import options, parse, tune
    from . import presets as stored
    from .spec import plan

    sized = any(value is not None for value in given.values())
    names = parse.parse_choices(
        "--shapes", [presets or (PRESETS.partition(",")[0] if sized else PRESETS)], stored.preset_names()
    )
    sizes = get_provider("mdn-triton").chunk_sizes
    found = {}
    for name in names:
        spec = options.sweep_spec(name, {**given, "provider": ["mdn-triton"], "device": "cuda"}, 0, planning=True)
        for point in plan(spec):
            w = point.workload
            if w.chunk_size not in sizes:
                raise ValueError(f"--chunk-size {w.chunk_size} is not offered: use one of {', '.join(map(str, sizes))}")
            if w.value_heads != w.heads:
                raise ValueError(
                    f"--value-heads {w.value_heads} for {w.heads} heads: stored configurations serve calls with as "
                    f"many value heads as heads; tune with --heads {w.value_heads}"
                )
            found.setdefault(tune.key_of(w, "forward"), w)
    return list(found.values())


def parse_duration(option: str, text: str) -> float:
    """Seconds of "90s", "10m", "1h" or "90".

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{option} {text!r} is no time above 0; write for example {option} 10m")
    return float(match[1]) * _SECONDS[match[2]]


def _jobs(text: str | None) -> int:
    from . import parse

    if text is not None:
        return parse.parse_int("--jobs", text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores)


def _gpu(device: str | None) -> str:
    """The device to tune on.

    Raises:
        ValueError: when it is no GPU that PyTorch sees.
    """
    import torch

    from . import presets

    if device is not None and not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"--device {device!r}: candidates are timed on a GPU; use cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ValueError(
            "there is no GPU here that PyTorch sees, and candidates are timed on one: run mdnbench tune on the machine "
            "with the GPU; mdnbench tune --show works here, and mdnbench doctor says why a GPU is not seen"
        )
    return presets.resolve_device(device or "cuda", torch.cuda.device_count())


def _show(workloads: list[Workload], device: str | None) -> int:
    import torch

    from . import tune, tune_views
    from .tune_interface import Tunable

    with validating():
        place = _gpu(device) if device is not None or torch.cuda.is_available() else None
        gpus = tune.known_gpus(place)
    rows = []
    for gpu in gpus:
        for workload in workloads:
            for direction in tune.DIRECTIONS:
                try:
                    config, source, entry = tune.in_use(workload, direction, gpu)
                except ValueError as fault:  # no configuration fits
                    rows.append([gpu.name, workload.label(), direction, "", "", str(fault)])
                    continue
                given = {name: value for name, value in config.items() if value is not None}
                latency = "" if entry is None or entry.latency_ms is None else f"{entry.latency_ms:.4g}"
                rows.append([gpu.name, workload.label(), direction, Tunable().label(given), latency, source])
    if not gpus:
        fail("nothing is stored for any GPU, and there is none here: mdnbench tune on a machine with a GPU")
        return 1
    tune_views.show_in_use(make_console(), rows)
    return 0


def _export(workloads: list[Workload], device: str | None, out: Path | None) -> int:
    import torch

    from . import tune

    with validating():
        place = _gpu(device) if device is not None or torch.cuda.is_available() else None
        gpus = tune.known_gpus(place)
        try:
            for gpu in gpus:
                path, tuned = tune.export(gpu, workloads, out)
                print(f"{path}: {tuned} tuned entries; for the other shapes the table of config.py, hand-chosen")
        except OSError as fault:
            where = f"--out {str(out)!r}" if out else "the installed package"
            raise BadInput(f"{where} cannot be written to ({fault.strerror}): give a folder by --out") from None
    if not gpus:
        fail("nothing is stored for any GPU, and there is none here: mdnbench tune on a machine with a GPU")
    return 0 if gpus else 1


def _tune(
    workloads: list[Workload], device: str, seconds: float | None, jobs: int, out: Path | None, resume: bool
) -> int:
    from . import tune, tune_views
    from .tune_interface import Settings

    gpu = tune.known_gpus(device)[0]
    _select(device)
    with validating():
        tune.store.check_writable(gpu)
        folder = _folder(out, resume)
        log = tune.open_log(folder, gpu, resume)
    deadline = None if seconds is None else time.monotonic() + seconds
    go_on = f"go on with: mdnbench tune --resume --out {shlex.quote(str(folder))}"

    def search(number: int, workload: Workload, display: TuneDisplay) -> list[Choice]:
        left = None
        if deadline is not None:
            left = max(1.0, deadline - time.monotonic()) / (len(workloads) - number)
        return tune.tune(workload, gpu, log, Settings(jobs=jobs, seconds=left), display)

    found, missing, failures, code = _for_each(workloads, log, search)
    _report(found, log)
    for workload, direction in missing:
        name = f"{direction} {workload.label()}"
        if tune.unfinished(log, workload, direction):
            failures.append(f"{name}: the time was too short, and nothing is stored for it; {go_on}")
        else:
            failures.append(f"{name}: nothing was right; the reasons are in {log.path}")
    for failure in failures:
        fail(failure)
    if code == INTERRUPTED:
        fail(f"stopped; nothing found is lost, {go_on}")
    changed = sum(what != tune_views.INCUMBENT for _, what in found)
    if found:
        store = tune.store
        saved = store.file_of(store.user_folder(), gpu.name)
        print(f"{changed} of {len(found)} changed, {len(found) - changed} keep their configuration; saved in {saved}")
    return code or (1 if missing or failures else 0)


def _verify(workloads: list[Workload], device: str, jobs: int) -> int:
    from . import tune
    from .tune_interface import Settings

    gpu = tune.known_gpus(device)[0]
    _select(device)
    folder = Path(tempfile.mkdtemp(prefix="mdnbench-verify-"))
    log = tune.open_log(folder, gpu, resume=False)

    def search(number: int, workload: Workload, display: TuneDisplay) -> list[Choice]:
        return tune.verify(workload, gpu, log, Settings(jobs=jobs), display)

    found, missing, failures, code = _for_each(workloads, log, search)
    if not failures:  # one may name a file there
        shutil.rmtree(folder)
    _report(found, log)
    for failure in failures:
        fail(failure)
    if code == INTERRUPTED:
        fail("stopped: what is above was verified")
    wrong = len(missing) + sum(it.incumbent_latency_ms is None for it, _ in found)
    loss = max((1 - choice.ratio for choice, _ in found), default=0.0)
    if found or missing:
        print(
            f"what is in use loses at most {100 * loss:.1f} % to its runner-ups and the table; {wrong} are no longer "
            f"right"
        )
    return code or (1 if wrong or failures else 0)


def _for_each(
    workloads: list[Workload], log: TuneLog, search: Callable[[int, Workload, TuneDisplay], list[Choice]]
) -> tuple[list[tuple[Choice, str]], list[tuple[Workload, str]], list[str], int]:
    """Search for one workload after the other, and close the log.

    Returns:
        The choices with what they change; workload and direction of those that there are none for; a line for each
        workload that cannot be searched for, and for a search that cannot go on; the exit code of one that was stopped,
        else 0.
    """
    from . import tune, tune_views

    found: list[tuple[Choice, str]] = []
    missing: list[tuple[Workload, str]] = []
    failures: list[str] = []
    code = 0
    try:
        with tune_views.TuneDisplay() as display:
            for number, workload in enumerate(workloads):
                display.heading = f"{number + 1}/{len(workloads)} {workload.label()}"
                try:
                    choices = search(number, workload, display)
                except (OSError, ValueError) as fault:  # a shape that does not fit, a store that cannot be written
                    failures.append(f"{workload.label()}: {fault}")
                    continue
                found += [(choice, tune_views.words(choice, log)) for choice in choices]
                chosen = [choice.tunable.split()[0] for choice in choices]
                missing += [(workload, direction) for direction in tune.DIRECTIONS if direction not in chosen]
    except KeyboardInterrupt:
        code = INTERRUPTED
    except RuntimeError as fault:  # no process comes up
        failures.append(f"{fault}; see {log.path.with_name('worker.log')}")
    finally:
        log.close()
    return found, missing, failures, code


def _select(device: str) -> None:
    """Make a GPU the only one, and so the current one, of the processes started from here."""
    _, _, index = device.partition(":")
    if index:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)] if visible else index


def _folder(out: Path | None, resume: bool) -> Path:
    """Where the search is logged.

    Raises:
        ValueError: when there is none to go on with.
    """
    if out is not None or not resume:
        return out or new_folder(RUN_NAME)
    found = sorted(RUNS_FOLDER.glob(f"*-{RUN_NAME}"))
    if not found:
        raise ValueError(f"--resume: there is no search in {RUNS_FOLDER}: name its folder by --out")
    return found[-1]


def _report(found: list[tuple[Choice, str]], log: TuneLog) -> None:
    from . import tune_views

    console = make_console()
    tune_views.show_statuses(console, list(log.trials.values()))
    if found:
        tune_views.show_choices(console, found)
