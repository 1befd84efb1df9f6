"""Records to tables: rows of plain values, and one block an operator for Markdown, CSV and the terminal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mdnbench.bench.metrics import METRICS, host_overheads_ms, percent_of_roofline, reported_interval, slowed_by
from mdnbench.bench.quality import notes as quality_notes
from mdnbench.bench.results import MODES, Record

from . import style
from .runs import Run

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]

# Columns that say what was measured: header and text, in the order rows are sorted by. Shown where they differ.
_KEYS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "device": ("device", lambda row: row["device"]),
    "dtype": ("dtype", lambda row: row["dtype"]),
    "gates": ("gates", lambda row: row["gates"]),
    "batch": ("B", lambda row: str(row["batch"])),
    "heads": ("H", lambda row: _heads(row)),
    "head_dims": ("K/V", lambda row: f"{row['head_dim_k']}/{row['head_dim_v']}"),
    "seq_len": ("T", lambda row: style.count(row["seq_len"])),
    "regime": ("regime", lambda row: row["regime"]),
    "mode": ("mode", lambda row: style.MODE_SHORT.get(row["mode"], row["mode"])),
    "chunk_size": ("C", lambda row: "-" if row["chunk_size"] is None else str(row["chunk_size"])),
    "run": ("run", lambda row: row["run"]),
    "provider": ("provider", lambda row: row["provider"]),
}
_CHOICES = {"run", "chunk_size", "provider"}  # what may be chosen for a given problem: the best is among these
_WORDS = {
    "device": "on {}",
    "batch": "batch {}",
    "heads": "heads {}",
    "head_dims": "K/V {}",
    "seq_len": "T {}",
    "chunk_size": "chunk size {}",
    "gates": "gates {}",
    "regime": "{} calls",
}


@dataclass(frozen=True)
class Cell:
    """One value as people read it, and whether it is the best of its problem."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Block:
    """The table of one operator."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: Sequence[bool]  # which columns are aligned to the right


@dataclass(frozen=True)
class Failure:
    """Points without a time that share a status and a reason."""

    status: str
    count: int
    providers: Sequence[str]
    reason: str


def to_rows(runs: Sequence[Run]) -> list[Row]:
    """One flat dictionary a record: point, status, every metric, and the error of the worst tensor. No samples.

    `host_overhead_ms` is eager minus graph, where both were measured; `percent_of_roofline` needs the peaks of the
    machine (`mdnbench peaks`).
    """
    rows = []
    for run in runs:
        overheads = host_overheads_ms(run.records)
        rows += [_row(run, record, overheads.get(record.point)) for record in run.records]
    return rows


def _row(run: Run, record: Record, host_overhead_ms: float | None) -> Row:
    point = record.point
    # From the samples where they are enough: rows of earlier versions hold intervals without the correction.
    there = record.latency_ms is not None
    low, high = (reported_interval(record.samples_ms) if there else None) or (
        record.latency_low_ms,
        record.latency_high_ms,
    )
    return {
        "run": run.name,
        "operator": record.operator,
        "provider": point.provider,
        **point.workload.to_dict(),
        "mode": point.mode,
        "regime": point.regime,
        "cache": point.cache,
        "status": record.status,
        "reason": record.reason,
        **{name: metric.function(record) for name, metric in METRICS.items()},
        "percent_of_roofline": percent_of_roofline(record, run.environment.get("peaks")),
        "host_overhead_ms": host_overhead_ms,
        "latency_low_ms": low,
        "latency_high_ms": high,
        "samples": len(record.samples_ms),
        "stop_reason": record.stop_reason,
        "precision": record.precision,
        "time_limit_s": record.time_limit_s,
        "min_time_s": record.min_time_s,
        "slowed_by": " and ".join(slowed_by(record)) or None,
        "quality": ", ".join(note.kind for note in quality_notes(record)) or None,
        "input_sets": record.input_sets,
        "checked_seq_len": record.checked_seq_len,
        "threads": record.threads,
        "notes": "; ".join(record.notes) or None,
        "seed": record.seed,
        "time": record.time,
    }


def to_frame(runs: Sequence[Run]) -> pandas.DataFrame:
    """`to_rows` as a data frame; absent numbers are missing values."""
    import pandas

    return pandas.DataFrame(to_rows(runs)).convert_dtypes()


def blocks(rows: Sequence[Row]) -> list[Block]:
    """One block an operator from the rows with status "ok", ordered by workload; the best value of each problem is
    marked where at least two rows share that problem (same shape, dtype, device, gates, mode and regime)."""
    operators: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            operators[row["operator"]].append(row)
    varying = [key for key in _KEYS if len({_key(row, key) for row in rows}) > 1]
    return [_block(name, operators[name], varying) for name in sorted(operators, key=style.operator_rank)]


def constants(rows: Sequence[Row]) -> str:
    """What all rows have in common, in words."""
    shared = [key for key in _KEYS if key not in ("provider", "run") and len({_key(row, key) for row in rows}) == 1]
    texts = {key: _KEYS[key][1](rows[0]) for key in shared} | {"mode": style.MODE_TITLES.get(rows[0]["mode"])}
    words = [_WORDS.get(key, "{}").format(texts[key]) for key in shared]
    threads = {row["threads"] for row in rows} - {None}
    return ", ".join(words + [f"{number} threads" for number in threads if len(threads) == 1])


def failures(rows: Sequence[Row]) -> list[Failure]:
    """Points without a time, grouped by status and reason, the largest group of each status first."""
    groups: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["status"] != "ok":
            reason = (row["reason"] or "no reason recorded").strip().splitlines()[0]
            groups[row["status"], reason][row["provider"]] += 1
    found = [Failure(status, names.total(), tuple(names), reason) for (status, reason), names in groups.items()]
    return sorted(found, key=lambda failure: (failure.status, -failure.count))


def notes(rows: Sequence[Row]) -> list[str]:
    """What providers say about their rows: "provider: note", each once."""
    return list(dict.fromkeys(f"{row['provider']}: {row['notes']}" for row in rows if row["notes"]))


def counts(rows: Sequence[Row]) -> str:
    """Such as "108 points: 84 ok, 24 unsupported"."""
    by_status = Counter(row["status"] for row in rows)
    return f"{len(rows)} points: " + ", ".join(f"{number} {status}" for status, number in by_status.most_common())


def _heads(row: Row) -> str:
    return str(row["heads"]) if row["heads"] == row["value_heads"] else f"{row['heads']}/{row['value_heads']}"


def _key(row: Row, key: str) -> Any:
    if key == "head_dims":
        return (row["head_dim_k"], row["head_dim_v"])
    if key == "heads":
        return (row["heads"], row["value_heads"])
    if key == "mode":
        return MODES.index(row["mode"])
    return -1 if row[key] is None else row[key]


def _block(operator: str, rows: list[Row], varying: Sequence[str]) -> Block:
    providers = {row["provider"] for row in rows}
    title = f"{style.OPERATOR_TITLES.get(operator, operator)} ({min(providers) if len(providers) == 1 else operator})"
    keys = [key for key in varying if key != "provider" or len(providers) > 1]
    keys = [
        key for key in keys if any(_key(row, key) != -1 for row in rows)
    ]  # such as chunk sizes, where there are none
    rows = sorted(rows, key=lambda row: tuple(_key(row, key) for key in _KEYS))
    best = _best(rows)
    square = all(row["head_dim_k"] == row["head_dim_v"] for row in rows)
    values = [name for name in _VALUES if name in _ALWAYS or any(row[name] is not None for row in rows)]
    header = ["K=V" if key == "head_dims" and square else _KEYS[key][0] for key in keys]
    header += [_VALUES[name][0] for name in values]
    cells = [
        [Cell(str(row["head_dim_k"]) if key == "head_dims" and square else _KEYS[key][1](row)) for key in keys]
        + [Cell(_text(row, name), (index, name) in best) for name in values]
        for index, row in enumerate(rows)
    ]
    numeric = [key in ("batch", "heads", "head_dims", "seq_len", "chunk_size") for key in keys] + [True] * len(values)
    return Block(title, header, cells, numeric)


# Columns of values: header and text of a value that is there.
_VALUES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "latency_ms": (
        "time ms",
        lambda row: (
            style.time_ms(row["latency_ms"], row["latency_low_ms"], row["latency_high_ms"], row["samples"])
            + (style.THROTTLED if row["slowed_by"] else "")
        ),
    ),
    "host_overhead_ms": ("host ms", lambda row: f"{row['host_overhead_ms']:.3g}"),
    "tokens_per_s": ("tokens/s", lambda row: style.rate(row["tokens_per_s"])),
    "tflops": ("TFLOP/s", lambda row: f"{row['tflops']:.3g}"),
    "percent_of_roofline": ("% roof", lambda row: f"{row['percent_of_roofline']:.3g}"),
    "peak_memory_bytes": ("MiB", lambda row: style.mebibytes(row["peak_memory_bytes"])),
    "max_relative_error": ("error", lambda row: style.error(row["max_relative_error"])),
}


_ALWAYS = ("latency_ms", "tokens_per_s", "peak_memory_bytes", "max_relative_error")  # the others where there are any
_RANKED = _ALWAYS  # values whose best is marked


def _text(row: Row, name: str) -> str:
    return "-" if row[name] is None else _VALUES[name][1](row)


def _best(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """(row index, value) pairs that are the best of their problem; times whose intervals overlap the best one's (at
    least those within 1 %), and values that read the same, tie with it. Where all tie there is no best."""
    problems: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        problems[tuple(_key(row, key) for key in _KEYS if key not in _CHOICES)].append(index)
    best = set()
    for members in problems.values():
        for name in _RANKED:
            there = [index for index in members if rows[index][name] is not None]
            if len(there) < 2:
                continue
            pick = max if METRICS[name].higher_is_better else min
            winner = rows[pick(there, key=lambda index: rows[index][name])]
            tied = {(index, name) for index in there if _ties(rows[index], winner, name)}
            best |= tied if len(tied) < len(there) else set()
    return best


def _ties(row: Row, winner: Row, name: str) -> bool:
    if name in ("latency_ms", "tokens_per_s") and row["latency_low_ms"] is not None and winner["latency_high_ms"]:
        return row["latency_low_ms"] <= winner["latency_high_ms"]
    return _text(row, name) == _text(winner, name)
