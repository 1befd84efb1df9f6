"""What a process of the gate runs in the environment of one side. It is passed to Python as text, by -c.

So it is this revision's code whatever the side holds, and it uses only what every revision has: `SweepSpec`, `plan`,
`run_sweep` and the registry. It first asserts that the code under test is imported from the side's own environment.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path


def main(request: dict) -> None:
    folder = Path(request["folder"])
    if hash_of(folder) != request["source_hash"]:
        sys.exit(f"the files in {folder} are not those that were installed")
    for package in request["packages"]:
        spec = importlib.util.find_spec(package)
        found = spec and spec.origin
        if not found or folder not in Path(found).resolve().parents:
            sys.exit(f"{package} is imported from {found}, not from the environment of this side, {folder}")
    from mdnbench.bench.sweep import SweepSpec, plan, run_sweep

    if request["task"] == "run":
        run_sweep(SweepSpec(**request["spec"]), request["out"])
    else:
        Path(request["out"]).write_text(json.dumps(describe(SweepSpec, plan, request["spec"])))
    tops = tuple(request["packages"])
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        ours = name in tops or name.startswith(tuple(f"{top}." for top in tops))
        if ours and file and folder not in Path(file).resolve().parents:
            sys.exit(f"{name} was imported from {file}, not from the environment of this side, {folder}")


def hash_of(folder: Path) -> str:
    """SHA-256 of names and contents of what is installed in a folder, caches and installation records left out."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and "__pycache__" not in parts and not parts[0].endswith(".dist-info"):
            found.update(f"{'/'.join(parts)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()


def describe(spec_class: type, plan, spec: dict) -> list:
    """The points of the sweep for every provider that there is, and why one cannot run; None where it can."""
    from mdnbench.baselines.registry import providers

    return [
        {
            "provider": name,
            "operator": provider.operator.name,
            "workload": point.workload.to_dict(),
            "mode": point.mode,
            "regime": point.regime,
            "reason": provider.supports(point.workload, point.mode),
        }
        for name, provider in providers().items()
        for point in plan(spec_class(**{**spec, "providers": [name]}))
    ]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
