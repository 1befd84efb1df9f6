"""Presets: sweeps kept as TOML files in this package, and how command-line options change them. Loads no torch."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from importlib import resources
from typing import Any

from .spec import SweepSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_PRESET = "smoke"
AUTO = "auto"
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}

_FOLDER = resources.files(__package__) / "presets"


def preset_names() -> tuple[str, ...]:
    """The names of all presets, by alphabet."""
    return tuple(sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml")))


def load_preset(name: str) -> dict[str, Any]:
    """The fields of `SweepSpec` that a preset sets. Some may be "auto": see `make_spec`.

    Raises:
        ValueError: for an unknown name, and for a file with fields that a sweep does not have.
    """
    if name not in preset_names():
        raise ValueError(f"--preset {name!r} is unknown: choose from {', '.join(preset_names())}")
    values = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    unknown = set(values) - {field.name for field in fields(SweepSpec)}
    if unknown:
        raise ValueError(f"--preset {name!r} sets {', '.join(sorted(unknown))}, which a sweep does not have")
    return values


def make_spec(values: dict[str, Any], cuda_devices: int, planning: bool = False) -> SweepSpec:
    """A specification from the values of a preset and of options.

    "auto" means, for `device`: the GPU if there is one; for `dtypes`: bfloat16 on a GPU, float32 on a CPU; for
    `regimes`: eager and graph on a GPU, eager on a CPU.

    Args:
        values: fields of `SweepSpec`.
        cuda_devices: how many GPUs PyTorch sees.
        planning: nothing will be run, so that a GPU need not be there.

    Raises:
        ValueError: as `SweepSpec`, and for a GPU that is not there.
    """
    device = resolve_device(values.get("device", AUTO), cuda_devices, planning)
    on_gpu = device.startswith("cuda")
    automatic = {
        "dtypes": (DEFAULT_DTYPE["cuda" if on_gpu else "cpu"],),
        "regimes": ("eager", "graph") if on_gpu else ("eager",),
    }
    chosen = {name: choice for name, choice in automatic.items() if values.get(name, AUTO) == AUTO}
    return SweepSpec(**values | chosen | {"device": device})


def resolve_device(device: str, cuda_devices: int, planning: bool = False) -> str:
    """ "cpu", "cuda" or "cuda:N": "auto" is the GPU if there is one.

    Raises:
        ValueError: for another name and, unless `planning`, for a GPU that is not there.
    """
    if device == AUTO:
        return "cuda" if cuda_devices else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device!r} is unknown: choose cpu, cuda, cuda:N or auto")
    kind, _, index = device.partition(":")
    if kind == "cuda" and not planning and int(index or 0) >= cuda_devices:
        sees = f"PyTorch sees {cuda_devices} GPUs, numbered from 0" if cuda_devices else "PyTorch sees no GPU here"
        raise ValueError(f"--device {device!r}: {sees}; use --device cpu, or ask mdnbench doctor why")
    return device
