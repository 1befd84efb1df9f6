"""What the compiled kernels need, for a GPU that is not here: registers, spills, shared memory, instructions by class.

An inspection is a JSON object: schema_version, target, the versions of triton and ptxas; `unsupported`, the reason of
each case (a name in `CASES` or of `tuned_cases`) that the operator refuses on the target; and `launches`, one object a
launch with its case and the figures of `compile_launches.figures_of`. The same code, Triton and ptxas give the same
bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import environment
from .code_figures import CLASSES, get_target

SCHEMA_VERSION = 1
DEFAULT_TARGET = "sm_90"
TIME_LIMIT_S = 900
_TUNED = Path(__file__).resolve().parent.parent / "kernels" / "tuned"

Inspection = dict[str, Any]
Launch = dict[str, Any]

_CHUNK = {"form": "chunk", "dtype": "bfloat16", "T": 4096, "chunk_size": 64, "states": False}
_BACKWARD = {**_CHUNK, "form": "backward"}
_STEP = {"form": "recurrent", "dtype": "bfloat16", "T": 1, "states": True}
_H16D128 = {"H": 16, "HV": 16, "K": 128, "V": 128}
_PAPER_400M = {"H": 6, "HV": 6, "K": 128, "V": 256}
_PAPER_1_3B = {"H": 6, "HV": 6, "K": 256, "V": 512}
# What is shipped: the shapes of the presets at chunk size 64 in bfloat16, as trained; the beginning of a generation,
# with states and packed sequences; and its steps. Arguments of `compile_launches.launches_of`.
CASES: dict[str, dict[str, Any]] = {
    "h16d128": {**_CHUNK, "B": 4, **_H16D128},
    "h16d128, one sequence": {**_CHUNK, "B": 1, **_H16D128},
    "h16d128, prefill": {**_CHUNK, "B": 4, **_H16D128, "packed": True, "states": True},
    "d64": {**_CHUNK, "B": 4, "H": 32, "HV": 32, "K": 64, "V": 64},
    "paper-400m": {**_CHUNK, "B": 8, **_PAPER_400M},
    "paper-1.3b": {**_CHUNK, "B": 4, **_PAPER_1_3B},
    "h16d128, backward": {**_BACKWARD, "B": 4, **_H16D128},
    "h16d128, one sequence, backward": {**_BACKWARD, "B": 1, **_H16D128},
    "d64, backward": {**_BACKWARD, "B": 4, "H": 32, "HV": 32, "K": 64, "V": 64},
    "paper-400m, backward": {**_BACKWARD, "B": 8, **_PAPER_400M},
    "paper-1.3b, backward": {**_BACKWARD, "B": 4, **_PAPER_1_3B},
    "h16d128, decoding": {**_STEP, "B": 64, **_H16D128},
    "paper-400m, decoding": {**_STEP, "B": 64, **_PAPER_400M},
    "paper-1.3b, decoding": {**_STEP, "B": 64, **_PAPER_1_3B},
}


def tuned_cases(capability: int) -> dict[str, dict[str, Any]]:
    """What is shipped as tuned for GPUs of a compute capability (times ten): as `CASES`. A forward is there as in a
    training call, and as in one without gradients, which is other code."""
    cases = {}
    for path in sorted(_TUNED.glob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["gpu"]["compute_capability"] != f"{capability // 10}.{capability % 10}":
            continue
        for entry in stored["entries"]:
            key, config = entry["key"], entry["config"]
            K, V, C = key["head_dim_k"], key["head_dim_v"], key["chunk_size"]
            heads, tokens = 1 << key["heads_bucket"], 1 << key["length_bucket"]
            name = f"{path.stem} {key['direction']}, H{heads} T{tokens} K{K} V{V} C{C} {key['dtype']}"
            if entry["source"] != "tuned":
                continue
            case = {
                "dtype": key["dtype"], "B": 1, "T": tokens, "H": heads, "HV": heads, "K": K, "V": V, "chunk_size": C,
                "free_p": key["free_p"], "states": False, "config": config,
            }  # fmt: skip
            if key["direction"] == "backward":
                cases[name] = {"form": "backward", **case}
            else:
                cases[name] = {"form": "chunk", "training": True, **case}
                cases[f"{name}, no gradients"] = {"form": "chunk", **case}
    return cases


def inspect(target: str = DEFAULT_TARGET) -> Inspection:
    """Compile every case for a target, without a GPU; a minute on one core, or less where Triton has it cached.

    Args:
        target: a name in `code_figures.TARGETS`.

    Raises:
        ValueError: for an unknown target.
        RuntimeError: where a kernel does not compile, or Triton or its tools are not there; naming what was compiled.
    """
    capability = get_target(target).capability
    ptxas = environment.ptxas(capability)
    if ptxas is None:
        raise RuntimeError("there is no Triton with a ptxas here: pip install triton, on Linux")
    cases = CASES | tuned_cases(capability)
    found = _compile({name: {**case, "capability": capability} for name, case in cases.items()})
    return {
        "schema_version": SCHEMA_VERSION,
        "target": target,
        "triton": environment.version("triton"),
        "ptxas": ptxas["version"],
        "unsupported": {it["case"]: it["unsupported"] for it in found if "unsupported" in it},
        "launches": [it for it in found if "unsupported" not in it],
    }


def _compile(cases: dict[str, dict[str, Any]]) -> list[Launch]:
    """The launches of all cases, and the cases that have none, in a process of its own that does not interpret."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mdnbench.bench.compile_launches"]
    try:
        run = subprocess.run(
            command, input=json.dumps(cases), env=variables, capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"compiling took more than {TIME_LIMIT_S} s") from None
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise RuntimeError(f"compiling failed: {reason}")
    return [json.loads(line) for line in run.stdout.splitlines()]


def configuration(launch: Launch) -> str:
    """How a launch was configured, for people: `BK=128 BV=32 C=64, 4 warps, 2 stages, at most 168 registers`."""
    sizes = [f"{name}={value}" for name, value in launch["constants"].items() if name.startswith("B") or name == "C"]
    parts = [" ".join(sizes), _counted(launch["num_warps"], "warp"), _counted(launch["num_stages"], "stage")]
    if launch["max_registers"]:
        parts.append(f"at most {launch['max_registers']} registers")
    return ", ".join(filter(None, parts))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def to_json(inspection: Inspection) -> str:
    """An inspection as the text of its file: one line a launch, so that differences read well."""
    head = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in inspection.items() if name != "launches"]
    launches = [f"  {json.dumps(launch)}" for launch in inspection["launches"]]
    return "\n".join(["{", *head, ' "launches": [', ",\n".join(launches), " ]", "}"]) + "\n"


def read(path: Path) -> Inspection:
    """A stored inspection.

    Raises:
        ValueError: when there is no such file, or it is not an inspection of this schema version.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as fault:
        raise ValueError(f"{path} cannot be read ({fault.strerror}): mdnbench inspect --out {path} makes it") from None


def parse(text: str, source: str) -> Inspection:
    """The inspection in a text, which comes from `source`.

    Raises:
        ValueError: when it is not one of this schema version.
    """
    try:
        inspection = json.loads(text)
    except ValueError:
        raise ValueError(f"{source} is not JSON: mdnbench inspect --out FILE makes an inspection") from None
    if not isinstance(inspection, dict) or inspection.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{source} is no inspection of schema version {SCHEMA_VERSION}: make it again")
    needed = {"case", "kernel", "constants", "num_warps", "num_stages", "max_registers", "registers", "stack_bytes"}
    needed |= {"shared_bytes", "programs_per_multiprocessor", "ptx", "sass", "code_bytes"}
    launches = inspection.get("launches")
    names = {"target", "triton", "ptxas", "unsupported"}
    if (
        not names <= set(inspection)
        or not isinstance(launches, list)
        or not all(isinstance(it, dict) and needed <= set(it) for it in launches)
    ):
        raise ValueError(f"{source} is an inspection with figures missing: make it again")
    return inspection


def table(inspection: Inspection) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people: a row a launch. Instructions are those of the machine code (SASS)."""
    header = ["case", "kernel", "configuration", "registers", "stack B", "shared B", "programs/SM", "code B", "PTX"]
    header += ["SASS", *(name.replace("_", " ") for name in CLASSES if name != "other")]
    rows = []
    for launch in inspection["launches"]:
        sass, ptx = launch["sass"], launch["ptx"]
        figures = [launch[name] for name in ("registers", "stack_bytes", "shared_bytes", "programs_per_multiprocessor")]
        figures += [launch["code_bytes"], sum(ptx.values()), sum(sass.values())]
        figures += [sass[name] for name in CLASSES if name != "other"]
        kernel = launch["kernel"].removesuffix("_kernel")
        rows.append([launch["case"], kernel, configuration(launch), *map(str, figures)])
    return header, rows


if __name__ == "__main__":
    print(to_json(inspect(*sys.argv[1:])), end="")
