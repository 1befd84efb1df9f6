"""The options of `mdnbench` and their help, one name each. Loads no torch."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mdnbench {metadata.version('mdnbench')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or results.jsonl files.")]
Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="smoke, ci, paper-400m, paper-1.3b or long-context. Default: smoke."),
]
Provider = Annotated[
    list[str] | None,
    typer.Option(
        "--provider", metavar="NAMES", help="Providers, or operators for all of theirs: mdn-torch,gdn. Default: all."
    ),
]
SeqLen = Annotated[
    str | None,
    typer.Option("--seq-len", metavar="INTS", help="Tokens a sequence: 512,2k,8k or 1k:64k:x2 or 256:1024:256."),
]
HeadDim = Annotated[str | None, typer.Option("--head-dim", metavar="INTS", help="Key dimension K of a head.")]
VHeadDim = Annotated[
    str | None,
    typer.Option("--v-head-dim", metavar="INTS", help="Value dimension V: one, or one for each K. Default: as K."),
]
ChunkSize = Annotated[
    str | None, typer.Option("--chunk-size", metavar="INTS", help="Tokens a chunk, for providers that have chunks.")
]
Batch = Annotated[str | None, typer.Option("--batch", metavar="INT", help="Sequences.")]
Heads = Annotated[str | None, typer.Option("--heads", metavar="INT", help="Query and key heads.")]
ValueHeads = Annotated[
    str | None,
    typer.Option("--value-heads", metavar="INT", help="Value heads, a multiple of --heads. Default: as many."),
]
Dtypes = Annotated[
    str | None, typer.Option("--dtype", metavar="NAMES", help="Of float32, float16, bfloat16; for q, k, v and o.")
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="float32, float16, bfloat16, or auto: by the device.")
]
Modes = Annotated[str | None, typer.Option("--mode", metavar="NAMES", help="Of forward, backward, forward_backward.")]
Regimes = Annotated[
    str | None,
    typer.Option(
        "--regime",
        metavar="NAMES",
        help="Of eager, graph (CUDA-graph replay), eager-warm, graph-warm (L2 cache not emptied).",
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:N, or auto: the GPU if there is one.")
]
SweepDevice = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:N, or auto: the GPU if there is one.")
]
Gates = Annotated[str | None, typer.Option("--gates", metavar="NAME", help="Gate profile. Default: mild.")]
GateProfiles = Annotated[
    list[str] | None,
    typer.Option("--gates", metavar="NAMES", help="Gate profiles: layer,beta=0, or all. Default: all."),
]
Seed = Annotated[str | None, typer.Option("--seed", metavar="INT", help="Seed of the inputs. Default: 0.")]
TimeLimit = Annotated[str | None, typer.Option("--time-limit", metavar="SECONDS", help="Of sampling a point, at most.")]
MinTime = Annotated[
    str | None,
    typer.Option("--min-time", metavar="SECONDS", help="Of sampling a point, at least. Default: limit / 10."),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision", metavar="PERCENT", help="Stop when the median's 95 % interval is ± this. Default: 0.5%."
    ),
]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the run. Default: the preset's.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Folder of the run. Default: runs/<time>-<name>.")
]
ReportOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Folder to write to. Default: the run's own; for several, or chosen rows, runs/<time>-report.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out: measure what is missing, retry what failed.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the points and a time estimate; run nothing, need no GPU.")
]
Json = Annotated[bool, typer.Option("--json", help="Print rows for machines on standard output, and nothing else.")]
