"""From the text of command-line options to a validated sweep. Every error is one line that names the option."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mdnbench.baselines.inputs import GATE_PROFILES
from mdnbench.baselines.provider import Provider
from mdnbench.baselines.registry import providers
from mdnbench.baselines.workload import DTYPES, Workload

from . import parse
from .check import plan_checks
from .presets import AUTO, DEFAULT_DTYPE, DEFAULT_PRESET, load_preset, make_spec, resolve_device
from .results import MODES, REGIMES, SWEEP_FILE, Point, results_path
from .spec import SweepSpec

CHECKED = {"seq_len": 257, "head_dim_k": 64, "head_dim_v": 64, "batch": 2, "heads": 2}  # 257: a last chunk of 1 token
ALL = "all"  # gate profiles of a check
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def select_providers(texts: Sequence[str] | None, option: str = "--provider") -> dict[str, Provider]:
    """The providers that are asked for, by name: names of providers, or of operators for all of theirs.

    Args:
        texts: each a name or several with commas; None or empty means every provider.
        option: which names them.

    Raises:
        ValueError: for a name that is neither.
    """
    known = providers()
    if not texts:
        return known
    operators = {provider.operator.name for provider in known.values()}
    chosen: dict[str, Provider] = {}
    for name in parse.split_names(texts):
        found = {key: it for key, it in known.items() if name in (key, it.operator.name)}
        if not found:
            near = difflib.get_close_matches(name, [*known, *operators], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{option} {name!r} is unknown: {hint}mdnbench list shows all names")
        chosen |= found
    if not chosen:
        raise ValueError(f"{option} {','.join(texts)!r} names nothing: mdnbench list shows all names")
    return chosen


def parse_gates(text: str) -> str:
    """The name of one gate profile."""
    names = parse.parse_choices("--gates", [text], tuple(GATE_PROFILES))
    if len(names) > 1:
        raise ValueError(f"--gates {text!r}: a sweep has one gate profile; run one sweep for each")
    return names[0]


def sweep_spec(preset: str | None, given: Mapping[str, Any], cuda_devices: int, planning: bool = False) -> SweepSpec:
    """The sweep that a preset and the given options stand for; an option goes before the preset.

    Args:
        preset: its name; None means "smoke".
        given: the values of options by their name with underscores ("seq_len", "provider", ...), None where not given.
        cuda_devices: how many GPUs PyTorch sees.
        planning: nothing will be run, so that a GPU need not be there.

    Raises:
        ValueError: for anything that is wrong, before anything runs.
    """
    given = {name: value for name, value in given.items() if value is not None}
    values = {"name": preset or DEFAULT_PRESET} | load_preset(preset or DEFAULT_PRESET)
    readers = {
        "seq_len": ("seq_lens", lambda text: parse.parse_ints("--seq-len", text)),
        "chunk_size": ("chunk_sizes", lambda text: parse.parse_ints("--chunk-size", text, "32,64")),
        "dtype": ("dtypes", lambda text: parse.parse_choices("--dtype", [text], DTYPES)),
        "mode": ("modes", lambda text: parse.parse_choices("--mode", [text], MODES)),
        "regime": ("regimes", lambda text: parse.parse_choices("--regime", [text], REGIMES)),
        "gates": ("gates", parse_gates),
        "name": ("name", _run_name),
        "time_limit": ("time_limit_s", lambda text: parse.parse_seconds("--time-limit", text)),
        "min_time": ("min_time_s", lambda text: parse.parse_seconds("--min-time", text)),
        "precision": ("precision", lambda text: parse.parse_percent("--precision", text, zero=False)),
        "batch": ("batch", lambda text: parse.parse_int("--batch", text)),
        "heads": ("heads", lambda text: parse.parse_int("--heads", text)),
        "value_heads": ("value_heads", lambda text: parse.parse_int("--value-heads", text)),
        "seed": ("seed", lambda text: parse.parse_int("--seed", text, least=0)),
        "device": ("device", str),
    }
    for option, value in given.items():
        if option in readers:
            field, read = readers[option]
            values[field] = read(value)
    if "head_dim" in given or "v_head_dim" in given:
        values["head_dims"] = _head_dims(given, values["head_dims"])
    values["providers"] = list(select_providers(given.get("provider") or values.get("providers")))
    _check_together(values, resolve_device(values.get("device", AUTO), cuda_devices, planning))
    return make_spec(values, cuda_devices, planning)


def resumed_or_new_spec(
    out: Path | None, resume: bool, preset: str | None, given: Mapping[str, Any], planning: bool = False
) -> SweepSpec:
    """The sweep to run: with --resume and no other option the one that is stored in --out, else as `sweep_spec`.

    Raises:
        ValueError: for anything that is wrong, before anything runs.
    """
    if resume and out is None:
        raise ValueError("--resume needs the folder of the run: add --out FOLDER")
    if resume and preset is None and all(value is None for value in given.values()):
        return stored_spec(out)
    return sweep_spec(preset, given, torch.cuda.device_count(), planning)


def device_name(device: str) -> str:
    """--device of `list` and `check`: "cpu", "cuda" or "cuda:N", "auto" resolved."""
    return resolve_device(device, torch.cuda.device_count())


def one_dtype(text: str, device: str) -> str:
    """--dtype of a command that takes one; "auto" by the device.

    Raises:
        ValueError: for another name, and for several.
    """
    if text == AUTO:
        return DEFAULT_DTYPE[device.partition(":")[0]]
    names = parse.parse_choices("--dtype", [text], DTYPES)
    if len(names) > 1:
        raise ValueError(
            f"--dtype {text!r}: give one dtype here, such as --dtype {names[0]}; mdnbench sweep takes several"
        )
    return names[0]


def check_points(
    provider: Sequence[str] | None, gates: Sequence[str] | None, dtype: str, device: str, option: str = "--gates"
) -> list[Point]:
    """The points of `mdnbench check`.

    Args:
        provider, dtype, device: the values of these options, the device resolved.
        gates: gate profiles; None, and "all" among them, means all.
        option: which names them.

    Raises:
        ValueError: for an unknown provider, gate profile or dtype, and where nothing is left to check.
    """
    chosen = tuple(select_providers(provider))
    profiles = parse.parse_choices(option, gates, (ALL, *GATE_PROFILES)) if gates else (ALL,)
    template = Workload(**CHECKED, dtype=one_dtype(dtype, device), device=device.partition(":")[0])
    points = plan_checks(chosen, template, None if ALL in profiles else profiles)
    if not points:
        raise ValueError(f"{option} {','.join(gates)!r}: no chosen provider reads these gates; leave {option} out")
    return points


def stored_spec(folder: Path) -> SweepSpec:
    """The sweep that a run folder holds.

    Raises:
        ValueError: when it holds none.
    """
    try:
        fields = json.loads((folder / SWEEP_FILE).read_text())["spec"]
        return SweepSpec(**fields)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"--resume: {folder} holds no sweep; give the folder of a run by --out") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"--resume: {folder / SWEEP_FILE} is damaged; start in another folder") from None


def check_value_heads(heads: int, value_heads: int | None) -> None:
    """Whether query heads can be shared out among value heads.

    Raises:
        ValueError: when they cannot, with numbers that are right.
    """
    if value_heads and value_heads % heads:
        right = ", ".join(str(heads * factor) for factor in (1, 2, 3))
        raise ValueError(f"--value-heads {value_heads} is not a multiple of --heads {heads}: use {right}, ...")


def check_folder(folder: Path, resume: bool) -> None:
    """Whether a sweep may go into a folder.

    Raises:
        ValueError: when it is a file, or holds results that are not resumed.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {str(folder)!r} is a file: give a folder")
    if not resume and results_path(folder).exists():
        raise ValueError(f"--out {str(folder)!r} holds results already: add --resume, or choose another folder")


def _check_together(values: Mapping[str, Any], device: str) -> None:
    """Options that are right alone and wrong together, said with the names of the options."""
    check_value_heads(values.get("heads", SweepSpec.heads), values.get("value_heads"))
    other = [regime for regime in values.get("regimes", ()) if regime != "eager"] if device == "cpu" else ()
    if other and values["regimes"] != AUTO:
        raise ValueError(f"--regime {other[0]} needs a GPU, and the device is cpu: use --regime eager")
    limit, least = values.get("time_limit_s", SweepSpec.time_limit_s), values.get("min_time_s")
    if least is not None and least > limit:
        raise ValueError(f"--min-time {least:g} is above --time-limit {limit:g}: raise the limit")


def _head_dims(given: Mapping[str, Any], preset_pairs: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    def read(option: str, name: str) -> tuple[int, ...] | None:
        return parse.parse_ints(option, given[name], "64,128", repeats=True) if name in given else None

    ks, vs = read("--head-dim", "head_dim"), read("--v-head-dim", "v_head_dim")
    return parse.pair_head_dims(ks or tuple(dict.fromkeys(k for k, _ in preset_pairs)), vs)


def _run_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--name {name!r}: use letters, digits, dots, dashes and underscores, such as --name h200-first"
        )
    return name
