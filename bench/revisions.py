"""The two sides of a gate: a revision of a git repository, installed in an environment of its own.

An environment is a folder that goes first on the import path of this Python: the side's own distribution comes from
there, and everything it depends on is shared, so that the two sides differ in nothing else and no network is needed.

The repository may be that of mdnbench, or that of a package that registers providers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import gate_side

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PIP_FAILED = ("error: metadata-generation-failed", "error: subprocess-exited-with-error")  # without saying why
_SIDE_CODE = Path(gate_side.__file__).read_text(encoding="utf-8")


class GateError(RuntimeError):
    """The gate cannot come to a verdict. The message is one line for people."""


@dataclass(frozen=True)
class Side:
    """One side, installed.

    Attributes:
        name: "base" or "head".
        label: the revision as given and its commit, for people.
        commit: its commit; that of HEAD for the working tree.
        folder: the environment.
        packages: import names of what is installed there.
        source_hash: SHA-256 of its files.
    """

    name: str
    label: str
    commit: str
    folder: Path
    packages: tuple[str, ...]
    source_hash: str

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of a process of this side."""
        inherited = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(self.folder), *inherited])}

    def run(
        self, task: str, spec: dict[str, Any], out: Path, log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        """Run a task of gate_side.py in a fresh process of this side.

        Args:
            task: "describe" or "run".
            spec: fields of `SweepSpec`.
            out: where the task writes.
            log: what the process prints is appended here.
            variables: further environment variables.

        Raises:
            GateError: when the process fails, with its last line.
        """
        request = {
            "task": task,
            "spec": spec,
            "out": str(out.resolve()),
            "folder": str(self.folder),
            "packages": self.packages,
            "source_hash": self.source_hash,
        }
        nowhere = self.folder.parent / "empty"  # the current folder is on the import path, and may hold a package
        nowhere.mkdir(exist_ok=True)
        command = [sys.executable, "-c", _SIDE_CODE, json.dumps(request)]
        failed = _run_logged(command, log, cwd=nowhere, env={**self.variables, **(variables or {})})
        if failed is not None:
            raise GateError(f"{self.name} ({self.label}): {failed}; see {log}")


def repository_root(folder: Path) -> Path:
    """The root of the git repository that a folder belongs to.

    Raises:
        GateError: when there is none, or no git.
    """
    return Path(_git(folder, "rev-parse", "--show-toplevel", fault=f"{folder} is in no git repository"))


def commit_of(repository: Path, option: str, revision: str) -> str:
    """The commit of a revision.

    Raises:
        GateError: when there is no such revision.
    """
    fault = (
        f"{option} {revision!r} is no revision of {repository}: give a commit, branch or tag; in a shallow clone, "
        f"fetch it first"
    )
    return _git(
        repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", fault=fault
    )


def changed_files(repository: Path) -> list[str]:
    """Tracked files that differ from HEAD, and files that git neither tracks nor ignores; relative to the root."""
    changed = _git(repository, "diff", "HEAD", "--name-only", "--no-renames", "-z")
    untracked = _git(repository, "ls-files", "--others", "--exclude-standard", "-z")
    return [name for name in f"{changed}\0{untracked}".split("\0") if name]


def install(repository: Path, name: str, revision: str | None, work: Path, log: Path) -> Side:
    """Install a revision of a repository in an environment under `work`.

    Args:
        name: "base" or "head".
        revision: None means the working tree with all changes, files that git ignores left out.
        work: a temporary folder.
        log: what the installer prints is appended here.

    Raises:
        GateError: when there is no such revision, or it does not install.
    """
    commit = commit_of(repository, f"--{name}", revision or "HEAD")
    changed = changed_files(repository) if revision is None else []
    label = (
        f"{revision}, commit {commit[:7]}" if revision and not commit.startswith(revision) else f"commit {commit[:7]}"
    )
    if revision is None:
        label = f"working tree, {label}" + (f" with {len(changed)} changed files" if changed else " without changes")
    target = (work / name).resolve()
    with _worktree(repository, commit, work.resolve() / f"{name}-source") as source:
        _overlay(repository, source, changed)
        failed = _run_logged(_installer(source, target), log, cwd=work)
        if failed is not None:
            raise GateError(f"{name} ({label}) does not install: {failed}; see {log}")
    packages = _packages(target)
    if not packages:
        raise GateError(f"{name} ({label}) installs no package: give a repository that holds a Python package")
    return Side(name, label, commit, target, packages, gate_side.hash_of(target))


@contextmanager
def _worktree(repository: Path, commit: str, folder: Path) -> Iterator[Path]:
    _git(repository, "worktree", "add", "--detach", "--force", str(folder), commit)
    try:
        yield folder
    finally:
        _git(repository, "worktree", "remove", "--force", str(folder))


def _overlay(repository: Path, source: Path, changed: Sequence[str]) -> None:
    """Bring a checkout of HEAD to the state of the working tree.

    Raises:
        GateError: for another git repository in it, whose state is not known here.
    """
    for name in changed:  # all of them first: a file may have become a folder, or a folder a link
        ours = source / name
        if ours.is_dir() and not ours.is_symlink():
            shutil.rmtree(ours)
        else:
            ours.unlink(missing_ok=True)
    for name in changed:
        theirs, ours = repository / name, source / name
        if theirs.is_symlink() or theirs.is_file():
            ours.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(theirs, ours, follow_symlinks=False)
        elif theirs.is_dir() and (theirs / ".git").exists():
            raise GateError(
                f"the working tree holds another git repository, {name}, with changes that cannot be installed: name "
                f"commits by --head, or have git ignore it"
            )


def _installer(source: Path, target: Path) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise GateError("the gate installs with pip, which is not there: python -m ensurepip")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-input", "--disable-pip-version-check"]
    if _builds_here(source):
        command.append("--no-build-isolation")  # else pip fetches what the build needs
    return [*command, "--target", str(target), str(source)]


def _builds_here(source: Path) -> bool:
    """Whether what pyproject.toml needs for a build is installed here."""
    try:
        system = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8")).get("build-system", {})
    except (OSError, ValueError):  # the installer says what is wrong
        system = {}
    backend = str(system.get("build-backend", "setuptools")).partition(":")[0].partition(".")[0]
    return "backend-path" in system or importlib.util.find_spec(backend) is not None


def _packages(target: Path) -> tuple[str, ...]:
    """Import names of the packages and modules in an environment; of a package within a package, the outer one."""
    folders = [path.parent for path in target.rglob("__init__.py")]
    outer = [folder for folder in folders if folder.parent not in folders]
    names = [".".join(folder.relative_to(target).parts) for folder in outer]
    return tuple(sorted([*names, *(path.stem for path in target.glob("*.py"))]))


def _run_logged(command: Sequence[str], log: Path, **options: Any) -> str | None:
    """Run a command, output to the end of a file. None when it succeeds, else its last line that says something."""
    with open(log, "ab") as file:
        start = file.tell()
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, **options).returncode
    if code == 0:
        return None
    lines = [line.strip() for line in log.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("hint:", "note:", "╰─>", "[notice]"))]
    lines = [line for line in lines if line not in _PIP_FAILED] or lines
    errors = [line for line in lines if re.match(r"error\b|[\w.]*(Error|Exception)\b", line, re.IGNORECASE)] or lines
    return errors[-1] if errors else f"it ended with exit code {code}"


def _git(folder: Path, *arguments: str, fault: str | None = None) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        raise GateError("git is not there: install it, or put it on PATH") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise GateError(fault if fault and "dubious ownership" not in last else f"git {arguments[0]} failed: {last}")
    return done.stdout.strip("\n")
