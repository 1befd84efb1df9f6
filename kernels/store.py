"""Configurations that a search has found fast and right, kept as JSON: shipped in tuned/, and in the user's cache.

A file holds the entries of one GPU model. An entry is for a direction ("forward", "backward"), a dtype, K, V, a chunk
size, and powers of two of the heads and of the length. A tuned entry holds for the kernels, Triton, ptxas and torch it
was found with: another compiler may make wrong code of it. Where there is none for the heads and the length at hand,
the nearest one serves, with a notice: the code is the same but for counts.

An entry marked "hand-chosen" is what the table of config.py chooses for a shape of the presets, without a time: it
holds the place of a tuned one, and a call asks the table itself. A call never searches, unless MDNBENCH_AUTOTUNE=1 is
set when this is imported.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from .space import CONFIGS, Config, Shape, why_invalid
from .versions import Versions, installed_versions

SCHEMA_VERSION = 1
AUTOTUNE = "MDNBENCH_AUTOTUNE"
TUNED, HAND_CHOSEN = "tuned", "hand-chosen"
SHIPPED_FOLDER = Path(__file__).with_name("tuned")
_FARTHEST = 3  # a doubling of heads, or three of the length: beyond it the table knows better
_HEADS_WEIGHT = 2  # of a factor of two in heads, against one in length: heads decide which tiles fill the GPU

_Kind = TypeVar("_Kind")
_types = functools.cache(get_type_hints)

log = logging.getLogger("mdnbench")
_autotune = os.environ.get(AUTOTUNE) == "1"


class Gpu(NamedTuple):
    """A GPU as far as configurations depend on it."""

    name: str
    compute_capability: str  # "9.0"
    shared_memory_bytes: int  # a program may use
    multiprocessors: int


class Key(NamedTuple):
    """What an entry is for. Buckets are powers of two, rounded up, as exponents."""

    direction: str
    dtype: str
    head_dim_k: int
    head_dim_v: int
    chunk_size: int
    free_p: bool
    heads_bucket: int  # of value heads of all sequences together
    length_bucket: int  # of tokens a sequence


@dataclass(frozen=True)
class Entry:
    """A stored configuration.

    Attributes:
        key: what it is for.
        config: fields of the configuration.
        source: "tuned" or "hand-chosen".
        versions: what it holds for; None for hand-chosen.
        latency_ms: median of the whole direction, cold L2 cache; None where nothing was measured.
        runner_ups: configurations that came next, the best first.
        place: "shipped" or "user"; not stored.
    """

    key: Key
    config: dict[str, int | None]
    source: str
    versions: Versions | None = None
    latency_ms: float | None = None
    runner_ups: tuple[dict[str, int | None], ...] = ()
    place: str = "user"


def bucket(count: int) -> int:
    """The exponent of the power of two that is at least `count`."""
    return max(count - 1, 0).bit_length()


def tuned_config(direction: str, x: Any, q: Any, free_p: bool) -> Config | None:
    """The stored configuration for a call of a layer (`problem.is_layer_call`), or None: the table of config.py then
    decides. Under 2 us after the first.

    Args:
        direction: "forward" or "backward".
        x: the `Problem` of the call.
        q: the queries, which say dtype and device.
        free_p: whether p is given.
    """
    device = q.device
    if device.type != "cuda":
        return None
    key = (direction, device.index, q.dtype, x.K, x.V, x.C, free_p, bucket(x.B * x.HV), bucket(x.T))
    found, tuned = _find(*key)
    if _autotune and not tuned and not free_p:
        _search(key[1:], x, q)
        found, _ = _find(*key)
    return found


@functools.cache
def _find(
    direction: str, device_index: int, dtype: Any, K: int, V: int, C: int, free_p: bool, heads: int, length: int
) -> tuple[Config | None, bool]:
    """The configuration, and whether it was tuned for this very key and these versions."""
    gpu = gpu_of(device_index)
    key = Key(direction, str(dtype).removeprefix("torch."), K, V, C, free_p, heads, length)
    entry, notice = look_up(key, gpu)
    if notice is not None:
        _notice(notice)
    if entry is None:
        return None, False
    return CONFIGS[direction](**entry.config), notice is None


def look_up(key: Key, gpu: Gpu, versions: Versions | None = None) -> tuple[Entry | None, str | None]:
    """The entry that serves `key` on `gpu`, None where the table of config.py does, and a sentence where there are
    tuned ones and none is for this key and these versions. The user's go before the shipped, near before far.

    Args:
        versions: that the code is made with; None means those installed.
    """
    near = [
        entry
        for entry in entries_of(gpu)
        if entry.source == TUNED and entry.key[:6] == key[:6] and _distance(entry.key, key) <= _FARTHEST
    ]
    if not near:
        return None, None
    near.sort(key=lambda entry: _distance(entry.key, key))
    shape = Shape(
        key.head_dim_k, key.head_dim_v, key.chunk_size, 4 if key.dtype == "float32" else 2, 1 << key.heads_bucket,
        key.free_p, gpu.shared_memory_bytes, gpu.multiprocessors,
    )  # fmt: skip
    versions = versions or installed_versions(gpu.compute_capability)
    faults = [_fault(entry, versions, shape) for entry in near]
    if None not in faults:
        return None, f"what was tuned for {describe(near[0].key)} is left out: {faults[0]}"
    nearest = near[faults.index(None)]
    if nearest.key != key:
        return nearest, f"{describe(key)} is not tuned on this GPU: it uses what was found for {describe(nearest.key)}"
    return nearest, None


def _fault(entry: Entry, versions: Versions, shape: Shape) -> str | None:
    """Why an entry cannot serve a shape, or None."""
    if entry.versions != versions:
        return f"it is for {_versions(entry.versions)}, not {_versions(versions)}"
    if "none" in versions:
        return f"of {_versions(versions)} one is not known"
    return why_invalid(entry.key.direction, CONFIGS[entry.key.direction](**entry.config), shape)


def _distance(one: Key, other: Key) -> int:
    return _HEADS_WEIGHT * abs(one.heads_bucket - other.heads_bucket) + abs(one.length_bucket - other.length_bucket)


def describe(key: Key) -> str:
    """A key for people."""
    p = ", free p" if key.free_p else ""
    return (
        f"the {key.direction} at K={key.head_dim_k} V={key.head_dim_v} C={key.chunk_size} {key.dtype}{p}, "
        f"up to {1 << key.heads_bucket} heads and {1 << key.length_bucket} tokens"
    )


def _versions(versions: Versions) -> str:
    return f"kernels {versions.kernels}, Triton {versions.triton}, ptxas {versions.ptxas}, torch {versions.torch}"


@functools.cache
def _notice(what: str) -> None:
    log.warning("%s; `mdnbench tune` finds a configuration (shown once)", what)


def forget() -> None:
    """Read the files again at the next look-up."""
    entries_of.cache_clear()
    _find.cache_clear()


def user_folder() -> Path:
    """$XDG_CACHE_HOME/mdnbench/tuned, or ~/.cache/mdnbench/tuned."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "mdnbench" / "tuned"


def file_of(folder: Path, gpu_name: str) -> Path:
    """The file of a GPU model: NVIDIA-H200.json."""
    return folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', gpu_name).strip('-')}.json"


@functools.cache
def entries_of(gpu: Gpu) -> tuple[Entry, ...]:
    """The user's entries and then the shipped ones. A file that cannot be read counts as empty, with a notice."""
    found: list[Entry] = []
    for place, folder in (("user", user_folder()), ("shipped", SHIPPED_FOLDER)):
        stored, entries = read_if_right(file_of(folder, gpu.name), place) or (None, [])
        if stored is not None and stored.compute_capability == gpu.compute_capability:
            found += entries
    return tuple(found)


def read_if_right(path: Path, place: str = "user") -> tuple[Gpu, list[Entry]] | None:
    """As `read`; None where there is no file, and, with a notice, where it cannot be read."""
    try:
        return read(path, place)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as fault:
        _notice(f"{path} is left out ({fault})")
        return None


def read(path: Path, place: str = "user") -> tuple[Gpu, list[Entry]]:
    """The GPU and the entries of a file.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is no file of this schema version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"its schema version is {content['schema_version']}, not {SCHEMA_VERSION}")
        return _made(Gpu, content["gpu"]), [_entry(fields, place) for fields in content["entries"]]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise ValueError(f"it is damaged: {type(fault).__name__}: {fault}") from None


def _entry(fields: dict[str, Any], place: str) -> Entry:
    """Raises KeyError or TypeError where anything in it is not what the rest reckons with."""
    key, versions = _made(Key, fields["key"]), fields["versions"]
    config, *runner_ups = (
        asdict(_made(CONFIGS[key.direction], it)) for it in (fields["config"], *fields["runner_ups"])
    )
    entry = Entry(
        key, config, fields["source"], None if versions is None else _made(Versions, versions), fields["latency_ms"],
        tuple(runner_ups), place,
    )  # fmt: skip
    if min(key.heads_bucket, key.length_bucket) < 0:
        raise TypeError("a bucket is below 0")
    if entry.source not in (TUNED, HAND_CHOSEN) or (entry.source == TUNED) != (versions is not None):
        raise TypeError(f"source {entry.source!r} with versions {versions}")
    if entry.latency_ms is not None and not _is_a(entry.latency_ms, int | float):
        raise TypeError(f"latency_ms={entry.latency_ms!r} is no number")
    return entry


def _made(kind: type[_Kind], fields: dict[str, Any]) -> _Kind:
    """`kind` of these fields. Raises TypeError when there are others, or one has another type than it says."""
    for name, wanted in _types(kind).items():
        if name in fields and not _is_a(fields[name], wanted):
            raise TypeError(f"{name}={fields[name]!r} is not {getattr(wanted, '__name__', wanted)}")
    return kind(**fields)


def _is_a(value: Any, wanted: Any) -> bool:
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def write(folder: Path, gpu: Gpu, entries: Sequence[Entry], kernels: str | None = None) -> Path:
    """Add entries to the file of a GPU in a folder; both are made when absent. One for the same key and versions is
    replaced, and a hand-chosen one by any for its key. Readers see the old file or the new one; a damaged one is set
    aside. Raises OSError.

    Args:
        kernels: a source hash: what was tuned for other kernels is dropped. None keeps it.

    Returns:
        The file.
    """
    path = file_of(folder, gpu.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        before = _read_or_set_aside(path)
        kept = {(entry.key, entry.versions): entry for entry in [*before, *entries]}
        if kernels:
            kept = {key: it for key, it in kept.items() if it.versions is None or it.versions.kernels == kernels}
        tuned = {entry.key for entry in kept.values() if entry.source == TUNED}
        lines = []
        for entry in sorted(kept.values(), key=lambda entry: (entry.key, entry.versions or ())):
            if entry.source == HAND_CHOSEN and entry.key in tuned:
                continue
            fields = asdict(entry)
            del fields["place"]
            fields["key"] = entry.key._asdict()
            fields["versions"] = entry.versions and entry.versions._asdict()
            lines.append(f"  {json.dumps(fields)}")
        head = [f' "schema_version": {SCHEMA_VERSION},', f' "gpu": {json.dumps(gpu._asdict())},', ' "entries": [']
        text = "\n".join(["{", *head, ",\n".join(lines), " ]", "}"]) + "\n"
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    forget()
    return path


def _read_or_set_aside(path: Path) -> list[Entry]:
    """The entries of a file that will be written again; none of a damaged one, which gets another name."""
    try:
        return read(path)[1]
    except FileNotFoundError:
        return []
    except ValueError as fault:
        aside = path.with_name(f"{path.name}.damaged")
        os.replace(path, aside)
        log.warning("%s is set aside as %s (%s)", path, aside.name, fault)
        return []


def check_writable(gpu: Gpu) -> None:
    """Raise ValueError unless the user's file of a GPU can be written later."""
    path = file_of(user_folder(), gpu.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.exists():
            path.read_bytes()
    except OSError as fault:
        raise ValueError(
            f"{path}, where what is found is kept, cannot be written to ({fault.strerror}): set XDG_CACHE_HOME to a "
            f"folder that can"
        ) from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, where the system can."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@functools.cache
def gpu_of(device_index: int) -> Gpu:
    """Of a CUDA device of this process."""
    import torch

    from .problem import limits_of

    properties = torch.cuda.get_device_properties(device_index)
    limits = limits_of(torch.device("cuda", device_index))
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", *limits)


_searched: set[tuple[Any, ...]] = set()


def _search(key: tuple[Any, ...], x: Any, q: Any) -> None:
    """Tune a shape in a process of its own, once for all that `key` holds for: a fault of a candidate ends it and not
    the caller. Both directions are searched."""
    options = {
        "batch": x.B, "heads": x.H, "value-heads": x.HV, "seq-len": x.T, "head-dim": x.K, "v-head-dim": x.V,
        "chunk-size": x.C, "budget": "5m", "dtype": str(q.dtype).removeprefix("torch."), "device": str(q.device),
    }  # fmt: skip
    arguments = tuple(f"--{name}={value}" for name, value in options.items())
    if key not in _searched:
        _searched.add(key)
        log.warning("%s=1: mdnbench tune %s", AUTOTUNE, " ".join(arguments))
        command = [sys.executable, "-c", "from mdnbench.bench.cli import main; raise SystemExit(main())", "tune"]
        # The command numbers GPUs by bus unless told otherwise; here they have the numbers that CUDA gives them.
        variables = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST", **os.environ}
        variables.pop(AUTOTUNE, None)
        out = user_folder().with_name("searches") / f"{os.getpid()}-{len(_searched)}-{time.time_ns()}"
        run = subprocess.run([*command, *arguments, f"--out={out}"], capture_output=True, text=True, env=variables)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
            log.warning("tuning failed (%s): the table of config.py is used", reason)
        forget()
