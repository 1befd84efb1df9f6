"""What `mdnbench list`, `check`, `doctor` and `sweep --dry-run` print for people."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from .console import duration, print_item, print_table
from .metrics import METRICS
from .results import Point, Record

if TYPE_CHECKING:
    from .doctor import Rule
    from .listing import Capabilities

MODE_NAMES = {"forward": "fwd", "backward": "bwd", "forward_backward": "fwd+bwd"}


def short(point: Point) -> str:
    """A point in a few words, for progress: provider, mode, and what changes from one to the next."""
    workload = point.workload
    chunk = "" if workload.chunk_size is None else f" C{workload.chunk_size}"
    sizes = f"T{workload.seq_len} K{workload.head_dim_k} V{workload.head_dim_v}{chunk}"
    regime = "" if point.regime == "eager" else f" {point.regime}"
    return f"{point.provider} {MODE_NAMES[point.mode]}{regime} {sizes}"


def show_plan(console: Console, points: Sequence[Point], seconds: float) -> None:
    """The points of a sweep, one line each, and how long they may take."""
    for point in points:
        console.print(Text(point.key), soft_wrap=True)
    console.print(f"{len(points)} points, about {duration(seconds)}; nothing was run")


def show_capabilities(console: Console, found: Sequence[Capabilities]) -> None:
    """One block an operator: a row a provider that runs here, then those that do not, with the reason."""
    for (name, title), members in _by(found, lambda row: (row.operator, row.operator_title)).items():
        console.print(Text(f"{title} ({name}) on {members[0].device}", style="bold"))
        rows = [
            (
                row.provider,
                " ".join(row.dtypes),
                "-" if row.chunk_sizes is None else " ".join(map(str, row.chunk_sizes)),
                " ".join(MODE_NAMES[mode] for mode in row.modes),
            )
            for row in members
            if row.reason is None
        ]
        if rows:
            print_table(console, ("provider", "dtypes", "chunk sizes", "modes"), rows)
        for row in members:
            if row.reason is not None:
                print_item(console, f"{row.provider} does not run here: {row.reason}")
        console.print()


def show_checks(console: Console, records: Sequence[Record]) -> None:
    """One block an operator: a row a gate profile, a column a provider, the largest relative error in each cell."""
    for operator, members in _by(records, lambda record: record.operator).items():
        providers = list(dict.fromkeys(record.point.provider for record in members))
        cells = {(record.point.workload.gates, record.point.provider): _verdict(record) for record in members}
        gates = list(dict.fromkeys(record.point.workload.gates for record in members))
        rows = [(profile, *(cells.get((profile, provider), "-") for provider in providers)) for profile in gates]
        console.print(Text(operator, style="bold"))
        print_table(console, ("gates", *providers), rows)
        console.print()
    reasons = Counter((r.status, r.point.provider, r.reason or "no reason given") for r in records if r.status != "ok")
    for (status, provider, reason), count in reasons.items():
        print_item(console, f"{count} {status}: {provider}: {reason}")
    counts = Counter(record.status for record in records).most_common()
    console.print("Largest relative error of the output and of every gradient against float64.")
    console.print(f"{len(records)} checks: {', '.join(f'{number} {status}' for status, number in counts)}")


def _verdict(record: Record) -> Text:
    if record.status == "unsupported":
        return Text("unsupported", style="dim")
    error = METRICS["max_relative_error"].function(record)
    shown = f"{error:.1e}" if error is not None and math.isfinite(error) else ""
    return Text(shown) if record.status == "ok" else Text(f"{record.status} {shown}".strip(), style="bold red")


def show_doctor(console: Console, facts: Sequence[tuple[str, str]], findings: Sequence[Rule]) -> None:
    """Hardware and versions, then what is wrong with them and what to do about it."""
    print_table(console, None, facts)
    console.print()
    for rule in findings:
        console.print(Text(f"{rule.level}: {rule.name}", style="bold red" if rule.level == "error" else "bold yellow"))
        print_item(console, rule.means)
        print_item(console, f"remedy: {rule.remedy}")
    errors = sum(rule.level == "error" for rule in findings)
    console.print(f"errors: {errors}, warnings: {len(findings) - errors}")


def _by(rows: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Rows grouped by a key, groups in the order of their first row."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups
