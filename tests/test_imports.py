"""Imports go one way: kernels <- baselines <- bench <- reports, and reports never loads torch or triton."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALL = {"kernels", "baselines", "bench", "reports"}
ALLOWED = {
    "kernels": {"kernels"},
    "baselines": {"baselines", "kernels"},
    "bench": {"bench", "baselines", "kernels"},
    "reports": {"reports", "bench"},
}
REPORTS_MAY_USE = {f"mdnbench.bench.{name}" for name in ("results", "metrics", "quality", "regress", "history")}
REPORTS_MAY_BE_USED_BY = {f"bench/{path.name}" for path in (ROOT / "bench").glob("cli*.py")}
KERNELS_MAY_BE_USED_BY = {"bench/tune.py", "bench/compile_launches.py"}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a source file imports, at any depth of its code."""
    package = f"mdnbench.{path.relative_to(ROOT).parent.as_posix().replace('/', '.')}"
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parts, node.module] if node.module else parts) if node.level else node.module
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


SOURCES = sorted(path for folder in ALL for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_import_direction(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    folder = relative.split("/")[0]
    modules = imported_modules(path)
    ours = {name for name in modules if name.startswith("mdnbench.")}
    folders = {name.split(".")[1] for name in ours}
    allowed = set(ALLOWED[folder])
    if relative in REPORTS_MAY_BE_USED_BY:
        allowed.add("reports")
    if folder == "bench" and relative not in KERNELS_MAY_BE_USED_BY:
        allowed.discard("kernels")
    assert folders <= allowed, f"{relative} imports from {sorted(folders - allowed)}"
    assert not {name.split(".")[0] for name in modules} & ALL, f"{relative} imports a bare top-level package"
    if folder == "reports":
        from_bench = {name for name in ours if name.startswith("mdnbench.bench.")}
        outside = {name for name in from_bench if ".".join(name.split(".")[:3]) not in REPORTS_MAY_USE}
        assert not outside, f"{relative} imports {sorted(outside)}"
        assert not {name.split(".")[0] for name in modules} & {"torch", "triton"}, f"{relative} imports torch or triton"


def test_light_modules_load_no_torch() -> None:
    light = ["mdnbench.baselines.workload", "mdnbench.baselines.provider", "mdnbench.bench.results"]
    light += ["mdnbench.bench.metrics", "mdnbench.bench.quality", "mdnbench.bench.cli"]
    light += [f"mdnbench.reports.{path.stem}" for path in (ROOT / "reports").glob("*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(light)}; print([m for m in ('torch', 'triton') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
