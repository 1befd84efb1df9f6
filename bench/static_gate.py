"""The gate that needs no GPU: compares what the compiled kernels need with what they needed at a base.

Worse is, for a launch that both sides have: spills that appear or grow, fewer programs a multiprocessor, fewer stages
of a pipeline, and more machine instructions of a class, beyond a threshold; and a case that the head refuses to run.
Registers and shared memory count by the programs that they leave room for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import inspection
from .code_figures import CLASSES, get_target
from .inspection import Inspection, Launch, configuration
from .revisions import GateError, Side, commit_of, install, repository_root

SAME, WORSE, ERROR = 0, 1, 4  # exit codes
DEFAULT_BASE = "HEAD"
DEFAULT_THRESHOLD = 0.05
FEW_INSTRUCTIONS = 8  # growth by no more is no finding, so that a class with few instructions may move by one or two


@dataclass(frozen=True)
class Finding:
    """A figure that differs.

    Attributes:
        case, kernel, configuration: of the head, or of the base where the head lacks it.
        figure: its name.
        base, head: values; None where a side lacks the launch.
        worse: whether it fails the gate.
    """

    case: str
    kernel: str
    configuration: str
    figure: str
    base: Any
    head: Any
    worse: bool


def run_static_gate(
    base: str | None, target: str = inspection.DEFAULT_TARGET, threshold: float = DEFAULT_THRESHOLD
) -> tuple[int, str]:
    """Compile the kernels as they are here and compare them with a base.

    Args:
        base: the file of an inspection, or a git revision of this repository, which is compiled as well; None: HEAD,
            so that uncommitted changes are judged.
        target: a name in `code_figures.TARGETS`.
        threshold: by which part instructions of a class may grow, above 0.

    Returns:
        Exit code and Markdown for people: 0 same or better, 1 worse, 4 error (one line).
    """
    base = base or DEFAULT_BASE
    try:
        if not threshold >= 0:
            raise GateError(f"--threshold {threshold!r} must be at least 0")
        get_target(target)
        before, now = _both_sides(base, target)
        findings = compare(before, now, threshold)
    except (ValueError, RuntimeError) as fault:  # a GateError is a RuntimeError
        return ERROR, f"static gate: {' '.join(str(fault).split())}"
    return WORSE if any(it.worse for it in findings) else SAME, report(findings, now, base)


def compare(base: Inspection, head: Inspection, threshold: float) -> list[Finding]:
    """What differs between two inspections, in the order of the head's launches; what is gone comes last.

    Raises:
        GateError: when they are of another target, Triton or ptxas, whose code does not compare, and for a head without
            launches.
    """
    if not head["launches"]:
        raise GateError("nothing was compiled here: no launch is left to compare")
    for name in ("target", "triton", "ptxas"):
        if base[name] != head[name]:
            raise GateError(
                f"the base was compiled with {name} {base[name]}, here it is {head[name]}, and figures compare for one "
                f"compiler only: give a git revision, or make the base again with mdnbench inspect --out FILE"
            )
    before, now = _by_launch(base), _by_launch(head)
    cases = {launch["case"] for launch in base["launches"]}
    findings = []
    for key, launch in now.items():
        if key in before:
            findings += _differences(before[key], launch, threshold)
            continue
        findings.append(_finding(launch, "launch", None, "new", False))
        if launch["stack_bytes"]:  # a kernel under a new name is no excuse for a spill; a new case has no base
            findings.append(_finding(launch, "stack_bytes", None, launch["stack_bytes"], launch["case"] in cases))
    for key, launch in before.items():
        if key not in now:
            refused = launch["case"] in head["unsupported"]
            findings.append(_finding(launch, "launch", "there", "unsupported" if refused else "gone", refused))
    return findings


def _by_launch(side: Inspection) -> dict[tuple[str, str, int], Launch]:
    """Launches by case, kernel, and which launch of that kernel it is in the case."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for launch in side["launches"]:
        name = launch["case"], launch["kernel"]
        found[(*name, seen[name])] = launch
        seen[name] += 1
    return found


def _differences(base: Launch, head: Launch, threshold: float) -> list[Finding]:
    def find(figure: str, before: Any, now: Any, worse: bool) -> None:
        if before != now:
            found.append(_finding(head, figure, before, now, worse))

    found: list[Finding] = []
    same_code = all(base[name] == head[name] for name in ("ptx", "sass", "code_bytes", "shared_bytes", "registers"))
    find("configuration", configuration(base), configuration(head), False)
    # Fewer stages leave fewer loads in flight, which no other figure shows. Where nothing is pipelined, code is equal.
    stages = base["num_stages"], head["num_stages"]
    find("num_stages", *stages, stages[1] < stages[0] and not same_code)
    find("stack_bytes", base["stack_bytes"], head["stack_bytes"], head["stack_bytes"] > base["stack_bytes"])
    programs = base["programs_per_multiprocessor"], head["programs_per_multiprocessor"]
    find("programs_per_multiprocessor", *programs, programs[1] < programs[0])
    for name in ("registers", "shared_bytes"):  # they matter by the line above, which they explain
        if programs[0] != programs[1]:
            find(name, base[name], head[name], False)
    for name in (*CLASSES, "all"):
        before, now = (sum(it["sass"].values()) if name == "all" else it["sass"][name] for it in (base, head))
        if abs(now - before) > max(threshold * before, FEW_INSTRUCTIONS):
            find(f"{name} instructions", before, now, now > before)
    return found


def _finding(launch: Launch, figure: str, base: Any, head: Any, worse: bool) -> Finding:
    return Finding(launch["case"], launch["kernel"], configuration(launch), figure, base, head, worse)


def report(findings: list[Finding], head: Inspection, base_name: str) -> str:
    """Markdown: the verdict, what is worse, and what else differs."""
    worse, others = ([it for it in findings if it.worse is wanted] for wanted in (True, False))
    launches = len({(it.case, it.kernel) for it in worse})
    verdict = f"{launches} of {len(head['launches'])} launches are worse" if worse else "no launch is worse"
    lines = [
        f"**Static gate: {verdict}** than at {base_name} ({len(head['launches'])} launches compiled for "
        f"{head['target']} by Triton {head['triton']}, ptxas {head['ptxas']})"
    ]
    for title, found in (("Worse", worse), ("Other differences", others)):
        if found:
            lines += ["", f"{title}:", "", "| kernel | case | configuration | figure | base | head | change |"]
            lines += ["|---|---|---|---|---:|---:|---:|", *map(_row, found)]
    return "\n".join(lines)


def _row(it: Finding) -> str:
    both_numbers = isinstance(it.base, int) and isinstance(it.head, int)
    change = f"{it.head / it.base - 1:+.1%}" if both_numbers and it.base else ""
    base = "" if it.base is None else it.base
    return f"| {it.kernel} | {it.case} | {it.configuration} | {it.figure} | {base} | {it.head} | {change} |"


def _both_sides(base: str, target: str) -> tuple[Inspection, Inspection]:
    """The inspections of the base and of the code here; compiled side by side."""
    file = Path(base)
    if file.is_file() or file.suffix == ".json":
        before = inspection.read(file)
        if before["target"] != target:
            raise GateError(f"{base} is of {before['target']}: give --target {before['target']}, or another file")
        return before, inspection.inspect(target)
    root = _checkout()
    commit_of(root, "--base", base)  # before anything takes time
    with tempfile.TemporaryDirectory(prefix="mdnbench-base-") as folder, ThreadPoolExecutor(1) as other:
        work = Path(folder)
        before = other.submit(_inspect_side, install(root, "base", base, work, work / "install.log"), target)
        now = inspection.inspect(target)
        return before.result(), now


def _checkout() -> Path:
    """The root of the git checkout that this code is run from."""
    here = Path(__file__).resolve().parent
    try:
        root = repository_root(here)
    except GateError:
        root = None
    if root is None or root.resolve() / "bench" != here:
        raise GateError("this mdnbench is not run from a git checkout: give the file of an inspection as --base")
    return root


def _inspect_side(side: Side, target: str) -> Inspection:
    """`inspect` of an installed revision, by its own code."""
    if not any(side.folder.glob("mdnbench/bench/inspection.py")):
        raise GateError(f"base ({side.label}) is older than mdnbench inspect: choose a later revision")
    inherited = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(side.folder), *inherited])}
    command = [sys.executable, "-c", _INSPECT, str(side.folder), target]
    # Its working directory comes first on the import path of what it starts with -m, and so must be the folder too.
    run = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=side.folder)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise GateError(f"inspecting base ({side.label}) failed: {reason}")
    return inspection.parse(run.stdout, f"what base ({side.label}) says of itself")


# An editable installation finds modules of its own where the path has none: these must come from the side's folder.
_INSPECT = """
import sys
from pathlib import Path
from mdnbench.bench import compile_launches, inspection
from mdnbench.kernels import forward, recurrent
for module in (compile_launches, inspection, forward, recurrent):
    if Path(sys.argv[1]).resolve() not in Path(module.__file__).resolve().parents:
        sys.exit(f"{module.__name__} is imported from {module.__file__}, not from the environment of this side")
print(inspection.to_json(inspection.inspect(sys.argv[2])), end="")
"""
