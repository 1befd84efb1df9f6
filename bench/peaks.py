"""What a machine reaches at best: copy bandwidth and the rate of matrix products, measured once a device and driver.

Stored in the user's cache folder. Importing this loads no torch, measuring does.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import metrics
from .floors import cache_folder
from .results import now

PEAKS_FILE = "peaks.json"
SECONDS_PER_CASE = {"cpu": 0.5, "cuda": 0.5}
MOST_SAMPLES = 200
# Bytes of each of the two tensors of a copy: far beyond every cache.
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
# Square matrices: the best of these counts. Small ones do not fill a GPU, the largest heat it up to its power limit.
MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}
MATMUL_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "float16", "bfloat16")}

Peaks = dict[str, Any]


def measure_peaks(
    environment: Mapping[str, Any],
    device: str = "cpu",
    on_case: Callable[[str], None] = lambda case: None,
    sizes: Sequence[int] | None = None,
    copy_bytes: int | None = None,
) -> Peaks:
    """Measure a device; seconds on a GPU, up to a minute on a CPU.

    float32 is measured without TF32, as "float32"; on a GPU TF32, which Triton and PyTorch may use for float32 inputs,
    is measured too, as "tf32".

    Args:
        environment: of `environment.collect(device)`: says what is measured.
        device: "cpu", "cuda" or "cuda:N".
        on_case: told what is measured next.
        sizes: of the square matrices; None means MATMUL_SIZES.
        copy_bytes: of a copied tensor; None means COPY_BYTES.

    Returns:
        `identity` of the environment, time, copy_bytes_per_s (read plus written bytes over the median time of a copy)
        and matmul_flops_per_s by dtype (2 n^3 over the median time, at the best size).
    """
    import torch

    from . import measure

    place = measure.use_device(device)
    kind = place.type
    on_case("copy")
    copied = _copy_rate(copy_bytes or COPY_BYTES[kind], place, kind)
    rates: dict[str, float] = {}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        for name in (*MATMUL_DTYPES[kind], *(("tf32",) if kind == "cuda" else ())):
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            dtype = getattr(torch, "float32" if name == "tf32" else name)
            for size in sizes or MATMUL_SIZES[kind]:
                on_case(f"{name} {size}")
                rate = _matmul_rate(size, dtype, place, kind)
                rates[name] = max(rates.get(name, 0.0), rate)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return {**identity(environment), "time": now(), "copy_bytes_per_s": copied, "matmul_flops_per_s": rates}


def _copy_rate(size: int, device: Any, kind: str) -> float:
    import torch

    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), kind)


def _matmul_rate(size: int, dtype: Any, device: Any, kind: str) -> float:
    import torch

    # Normal numbers: a GPU draws less power, and runs faster, on zeros.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out), kind)


def _median_seconds(call: Callable[[], object], kind: str) -> float:
    from . import measure

    time_calls = measure.time_on_cuda(cold=False) if kind == "cuda" else measure.time_on_cpu
    return metrics.median(measure.take_block(time_calls, call, SECONDS_PER_CASE[kind], MOST_SAMPLES)) / 1e3


def identity(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What a measurement of peaks holds for: device and driver, or CPU and the threads that may be used."""
    on_gpu = environment.get("device") == "cuda"
    return {
        "device": environment.get("device"),
        "device_name": environment.get("device_name"),
        "driver": (environment.get("gpu") or {}).get("driver") if on_gpu else None,
        "threads": None if on_gpu else (environment.get("cpu") or {}).get("usable_threads"),
    }


def load(environment: Mapping[str, Any], folder: Path | None = None) -> Peaks | None:
    """The stored peaks of the device of an environment; None where there are none.

    Args:
        environment: of a run, or of `environment.collect(device)`.
        folder: of the file; None means `floors.cache_folder()`.
    """
    return _of(identity(environment), _read(folder))


def store(peaks: Peaks, folder: Path | None = None) -> Path:
    """Keep peaks in place of those of the same device, if any. Returns the file.

    Raises:
        OSError: when it cannot be written.
    """
    names = identity({})
    others = [it for it in _read(folder) if any(it.get(name) != peaks[name] for name in names)]
    path = (folder or cache_folder()) / PEAKS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps([*others, peaks], indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


def with_peaks(environment: dict[str, Any], measured: Sequence[Peaks] = ()) -> dict[str, Any]:
    """An environment with the peaks of its device under "peaks": its own, else the first of `measured` that is of the
    same device and driver, else what is stored here. Without them where there are none."""
    if environment.get("peaks") or not environment.get("device"):
        return environment
    found = _of(identity(environment), measured) or load(environment)
    return environment | {"peaks": found} if found else environment


def _of(wanted: Mapping[str, Any], measured: Sequence[Peaks]) -> Peaks | None:
    return next((it for it in measured if all(it.get(name) == value for name, value in wanted.items())), None)


def _read(folder: Path | None) -> list[Peaks]:
    try:
        content = json.loads(((folder or cache_folder()) / PEAKS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: it is measured again
        return []
    usable = content if isinstance(content, list) else []
    return [it for it in usable if isinstance(it, dict) and "copy_bytes_per_s" in it and "matmul_flops_per_s" in it]
