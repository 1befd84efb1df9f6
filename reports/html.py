"""A report as one HTML file that needs no network: the data as JSON, and the assets of this package inlined."""

from __future__ import annotations

import html
import json
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import resources
from typing import Any

from mdnbench.bench.metrics import METRICS, matrix_peak, tolerance
from mdnbench.bench.quality import notes as quality_notes
from mdnbench.bench.results import GpuReading, Record

from . import accuracy, render, style, tables
from .runs import Run, describe

MOST_SAMPLES_SHOWN = 60  # of a row, evenly chosen from all in the order taken: the file stays small
SCRIPTS = ("base.js", "filters.js", "plot.js", "roofline.js", "table.js", "accuracy.js", "page.js")
_DARK = {"#000000": "#E4E4E4", "#0072B2": "#56A8E8", "#D55E00": "#F08A3C", "#009E73": "#2FC79A"}
_ASSETS = resources.files(__package__) / "assets"

# Metrics beside those of METRICS that rows hold: title, unit, whether higher is better.
_FURTHER = {
    "percent_of_roofline": ("Part of the roofline", "%", True),
    "host_overhead_ms": ("Host overhead: eager minus graph", "ms", False),
}
SPEED = (
    "tokens_per_s", "latency_ms", "tflops", "gbps", "percent_of_roofline", "host_overhead_ms", "sm_clock_mhz",
    "first_call_s",
)  # fmt: skip
MEMORY = ("peak_memory_bytes", "saved_memory_bytes")

# Columns of the table of rows: key, title, whether it is a number, and whether it is shown at the start; None: where
# rows that are alike in all of _ALIKE differ in it.
COLUMNS = (
    ("run", "run", False, True),
    ("operator", "operator", False, False),
    ("provider", "provider", False, True),
    ("mode", "mode", False, True),
    ("regime", "regime", False, True),
    ("cache", "L2", False, False),
    ("dtype", "dtype", False, None),
    ("device", "device", False, None),
    ("threads", "threads", True, None),
    ("gates", "gates", False, None),
    ("batch", "B", True, True),
    ("heads", "H", True, True),
    ("value_heads", "HV", True, None),
    ("head_dim_k", "K", True, True),
    ("head_dim_v", "V", True, True),
    ("seq_len", "T", True, True),
    ("chunk_size", "C", True, True),
    ("latency_ms", "time ms", True, True),
    ("half_width_percent", "± %", True, True),
    ("tokens_per_s", "tokens/s", True, True),
    ("tflops", "TFLOP/s", True, True),
    ("gbps", "GB/s", True, False),
    ("percent_of_roofline", "% roof", True, True),
    ("host_overhead_ms", "host ms", True, False),
    ("peak_memory_bytes", "peak MiB", True, True),
    ("saved_memory_bytes", "saved MiB", True, False),
    ("max_relative_error", "error", True, True),
    ("samples", "n", True, False),
    ("sm_clock_mhz", "SM MHz", True, False),
    ("first_call_s", "first call s", True, False),
    ("status", "status", False, True),
    ("flags", "flags", False, True),
)
_VARIABLES = {"mdn-authors": "MDNBENCH_AUTHORS_PATH=CHECKOUT "}  # before the command; CHECKOUT is the user's own
_ALIKE = (
    "provider", "mode", "regime", "batch", "heads", "head_dim_k", "head_dim_v", "seq_len", "chunk_size",
)  # fmt: skip


def page(runs: Sequence[Run]) -> str:
    """The report of runs as one HTML document."""
    data = to_data(runs)
    text = (_ASSETS / "report.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(data["title"]),
        "STYLE": (_ASSETS / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "DATA": _embedded(data),
    }
    for name, content in parts.items():
        head, _, tail = text.partition(f"<!--{name}-->")
        text = head + content + tail
    return text


def to_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    rows = tables.to_rows(runs)
    records = [record for run in runs for record in run.records]
    for row, record in zip(rows, records):
        row |= _details(row, record)
    ordered = sorted(rows, key=lambda row: style.operator_rank(row["operator"]))
    looks = style.looks((row["operator"], row["provider"]) for row in ordered)
    operators = dict.fromkeys(row["operator"] for row in ordered)
    return {
        "title": ", ".join(run.name for run in runs),
        "runs": [_run(run, rows) for run in runs],
        "rows": rows,
        "columns": _columns(rows),
        "metrics": _metrics(),
        "speed": SPEED,
        "memory": MEMORY,
        "operators": {name: style.OPERATOR_TITLES.get(name, name) for name in operators},
        "providers": {
            name: {
                "operator": next(row["operator"] for row in rows if row["provider"] == name),
                "light": look.colour,
                "dark": _DARK.get(look.colour, look.colour),
                "marker": style.MARKERS.index(look.marker),
            }
            for name, look in looks.items()
        },
        "fastest": _fastest(rows),
        "failures": [vars(failure) for failure in tables.failures(rows)],
        "notes": [f"{text}." for text in render.measurement_notes(runs)]
        + [f"Note on {text}." for text in tables.notes(rows)],
        "accuracy": accuracy.to_data(runs),
    }


def command(row: tables.Row) -> str:
    """The command that measures one row again, or checks it where it was only checked."""
    timed = row["samples"] or row["status"] != "ok"
    given: dict[str, Any] = {"provider": row["provider"]}
    if timed:
        given |= {"seq-len": row["seq_len"], "head-dim": row["head_dim_k"], "v-head-dim": row["head_dim_v"]}
        given |= {"chunk-size": row["chunk_size"], "batch": row["batch"], "heads": row["heads"]}
        given |= {"value-heads": row["value_heads"] if row["value_heads"] != row["heads"] else None}
        given |= {"mode": row["mode"], "regime": row["regime"], "seed": row["seed"] or None}
        given |= {"time-limit": row["time_limit_s"], "min-time": row["min_time_s"], "precision": row["precision"]}
    given |= {"dtype": row["dtype"], "device": row["device"], "gates": row["gates"]}
    words = ["mdnbench", "sweep" if timed else "check"]
    words += [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    return _VARIABLES.get(row["provider"], "") + shlex.join(words)


def _details(row: tables.Row, record: Record) -> dict[str, Any]:
    """What the page shows of a row beside the values of every report."""
    low, high, middle = row["latency_low_ms"], row["latency_high_ms"], row["latency_ms"]
    flags = [f"throttled: {row['slowed_by']}"] if row["slowed_by"] else []
    found = quality_notes(record)
    flags += [note.kind for note in found if note.kind != "throttled"]
    step = max(1, math.ceil(len(record.samples_ms) / MOST_SAMPLES_SHOWN))
    return {
        "half_width_percent": (high - low) / 2 / middle * 100 if middle and low is not None and high else None,
        "flags": ", ".join(flags) or None,
        "advice": [f"{note.seen}; {note.remedy}" for note in found],
        "samples_shown": [float(f"{x:.4g}") for x in record.samples_ms[::step]],
        "errors": record.relative_error,
        "tolerances": {name: tolerance(row["dtype"], name) for name in record.relative_error or ()},
        "gpu_blocks": [_block_state(block) for block in record.gpu],
        "command": command(row),
    }


def _block_state(block: Sequence[GpuReading]) -> dict[str, Any]:
    """One block of samples in short: lowest clock, highest power and temperature, and all that held the GPU back."""
    readings = [it for it in block if it.at != "before"]

    def known(name: str) -> list[float]:
        return [value for value in (getattr(it, name) for it in readings) if value is not None]

    slowed_by = dict.fromkeys(name for it in readings for name in it.slowed_by)
    return {
        "sm_clock_mhz": min(known("sm_clock_mhz"), default=None),
        "power_w": max(known("power_w"), default=None),
        "temperature_c": max(known("temperature_c"), default=None),
        "slowed_by": list(slowed_by),
    }


def _run(run: Run, rows: Sequence[tables.Row]) -> dict[str, Any]:
    mine = [row for row in rows if row["run"] == run.name]
    facts = _flat({name: value for name, value in run.environment.items() if name not in ("time", "peaks")})
    return {
        "name": run.name,
        "measured": min((row["time"] for row in mine), default="")[:16].replace("T", " "),  # from then on, in UTC
        "description": describe(run.environment) or "environment not recorded",
        "shared": tables.constants(mine),
        "counts": dict(Counter(row["status"] for row in mine).most_common()),
        "timed": sum(bool(row["samples"]) for row in mine),
        "throttled": sum(bool(row["slowed_by"]) for row in mine),
        "environment": facts,
        "peaks": run.environment.get("peaks"),
        "ceilings": {row["dtype"]: matrix_peak(run.environment.get("peaks"), row["dtype"]) for row in mine},
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _columns(rows: Sequence[tables.Row]) -> list[dict[str, Any]]:
    """COLUMNS for these rows: which are shown is decided."""

    def kinds(*keys: str) -> int:
        return len({tuple(row[key] for key in keys) for row in rows})

    def found(key: str, title: str, numeric: bool, shown: bool | None) -> dict[str, Any]:
        shown = kinds(*_ALIKE, key) > kinds(*_ALIKE) if shown is None else shown
        return {"key": key, "title": title, "numeric": numeric, "shown": shown}

    return [found(*column) for column in COLUMNS]


def _metrics() -> dict[str, dict[str, Any]]:
    found = {name: (it.title, it.unit, it.higher_is_better) for name, it in METRICS.items()} | _FURTHER
    return {name: {"title": title, "unit": unit, "higher": higher} for name, (title, unit, higher) in found.items()}


def _fastest(rows: Sequence[tables.Row]) -> list[dict[str, Any]]:
    """For each run, mode and regime: how many of the problems that two providers have a time of each is fastest at."""
    problems: dict[tuple[Any, ...], list[tables.Row]] = defaultdict(list)
    shape = ("device", "dtype", "gates", "batch", "heads", "value_heads", "head_dim_k", "head_dim_v", "seq_len")
    for row in rows:
        if row["latency_ms"]:
            key = (row["run"], row["mode"], row["regime"], *(row[name] for name in shape))
            problems[key].append(row)
    wins: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for (run, mode, regime, *_), members in problems.items():
        if len({row["provider"] for row in members}) > 1:
            wins[run, mode, regime][min(members, key=lambda row: row["latency_ms"])["provider"]] += 1
    return [
        {"run": run, "mode": mode, "regime": regime, "problems": found.total(), "wins": dict(found.most_common())}
        for (run, mode, regime), found in wins.items()
    ]


def _embedded(data: dict[str, Any]) -> str:
    """JSON that is safe inside a script element, without values that JSON lacks."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
