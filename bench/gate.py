"""Runs a gate: both revisions installed, blocks in fresh processes in the order base, head, head, base, verdicts.

Everything measured stays in a folder: a run folder for each block, gate.json with what was compared, install logs.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mdnbench.baselines.registry import BrokenProvider
from mdnbench.baselines.workload import Workload

from . import paired, parse, regress, revisions
from .environment import Environment, identity
from .floors import Floors
from .regress import BASE, HEAD, Change, Comparison, MeasuredBlock, Sides, Untimed
from .results import Point, read_records
from .revisions import GateError, Side
from .spec import SweepSpec

GATE_FILE = "gate.json"
LOG_FILE = "gate.log"
ANY_PROVIDER = ("any",)  # stands in the specification until both sides have said what they hold


@dataclass(frozen=True)
class Held:
    """A point on one side: its operator, and why it cannot run; None where it can."""

    operator: str
    reason: str | None


RunBlock = Callable[[Side, SweepSpec, Path, Path], None]


@dataclass(frozen=True)
class GateProgress:
    """Told to the caller before each step."""

    step: str  # "install base", "install head", "base" or "head"
    done: int  # blocks
    total: int  # blocks, 0 while it is not known
    seconds_left: float | None


@dataclass(frozen=True)
class Gate:
    """What is compared and how.

    Attributes:
        repository: a folder of the git repository.
        base: a revision.
        head: a revision; None means the working tree.
        spec: what each block measures; its providers are replaced by those that both sides can run.
        providers: names of providers, or of operators for all of theirs; None means all.
        threshold: 0.03 for 3 %.
        pairs: of blocks in a round; None means as many as one slow point needs to be significant, 12 or more. A gate
            ends after a round that leaves nothing undecided, at the latest after `rounds`.
    """

    repository: Path
    base: str
    head: str | None
    spec: SweepSpec
    providers: Sequence[str] | None = None
    threshold: float = 0.03
    pairs: int | None = None
    rounds: int = 3


def run_gate(
    gate: Gate,
    folder: Path,
    environment: Environment,
    on_progress: Callable[[GateProgress], None] = lambda progress: None,
    run_block: RunBlock | None = None,
    floors_folder: Path | None = None,
) -> Comparison:
    """Compare two revisions.

    Args:
        folder: where the blocks are kept; it must not hold a gate.
        environment: of `environment.collect(device)`: floors are stored by it.
        run_block: measures one block of a side into a folder; None means a sweep in a fresh process.
        floors_folder: where noise floors are stored; None means the cache folder of the user.

    Raises:
        GateError: when there is no verdict: a revision that does not exist or does not install, code that comes from
            elsewhere, no process, no point that both sides can time.
    """
    if (folder / GATE_FILE).exists():
        raise GateError(f"{folder} holds a gate already: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")  # else the gate's own files change the working tree
    started = time.monotonic()
    with _installed(gate, folder, on_progress) as sides:
        held = {side.name: describe(side, gate.spec, folder) for side in sides}
        choice = choose(held, gate.providers)
        spec = replace(gate.spec, providers=choice.providers or gate.spec.providers)
        pairs = gate.pairs or paired.pairs_needed(choice.points)
        floors = Floors(machine(environment), spec.time_limit_s, floors_folder)
        stored = floors.load()
        blocks: list[MeasuredBlock] = []
        changes: list[Change] = []
        untimed: list[Untimed] = []
        for round_number in range(gate.rounds if choice.providers else 0):
            blocks += _measure(sides, spec, pairs, round_number, folder, on_progress, run_block or _run_sweep)
            changes, untimed = regress.compare_blocks(blocks, gate.threshold, stored)
            if not any(change.verdict == "undecided" for change in changes):
                break
    if blocks and not any(change.ratio or change.verdict == "gone" for change in changes):
        reasons = "; ".join(dict.fromkeys(f"{it.point.provider}: {it.status}: {it.reason}" for it in untimed))
        raise GateError(f"no point has a time on both sides ({reasons}); see {folder}")
    base, head = sides
    pairs = len(blocks) // 2
    significant = any(change.verdict in ("slower", "faster") for change in changes)
    notes = _notes(gate, sides, pairs, 0 if significant else choice.points)
    same_code = {change.point: regress.same_code_log_ratios(blocks, change.point) for change in changes if change.ratio}
    noisy = [change for change in changes if (change.floor or 0) > max(gate.threshold, regress.MOST_NOISE)]
    if noisy:
        notes.append(
            f"This machine is too busy or too uneven for {len(noisy)} points: their times vary by up to "
            f"{max(change.floor for change in noisy):.0%} without a change of the code."
        )
    if not floors.add(same_code):
        notes.append(f"The noise floor could not be stored in {floors.path.parent}.")
    notes.append(f"{pairs} pairs of blocks, {time.monotonic() - started:.0f} s in all.")
    changes, untimed = [*changes, *choice.changes], [*untimed, *choice.untimed]
    found = Comparison(base.label, head.label, gate.threshold, changes, untimed, notes)
    content = {
        "base": _facts(base), "head": _facts(head), "threshold": gate.threshold, "pairs": pairs,
        "exit_code": found.exit_code, "spec": spec.to_dict(), "environment": environment, "notes": notes,
    }  # fmt: skip
    (folder / GATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return found


@dataclass(frozen=True)
class Choice:
    """What a gate times, and what it cannot.

    Attributes:
        providers: those that can run a point on both sides.
        points: how many points these are.
        changes: the points of the other providers that one side alone can run: gone or new.
        untimed: their points that neither can run.
    """

    providers: tuple[str, ...]
    points: int
    changes: list[Change]
    untimed: list[Untimed]


def choose(held: dict[str, dict[Point, Held]], asked: Sequence[str] | None) -> Choice:
    """Sort out what can be timed on both sides.

    Args:
        held: by side, what `describe` returns.
        asked: names of providers or operators, None for all.

    Raises:
        GateError: for a name that neither side has, and where neither side has anything to time.
    """
    everything = held[BASE] | held[HEAD]
    known = {point.provider: it.operator for point, it in everything.items()}
    chosen = set(known)
    if asked:
        names = parse.split_names(asked)
        for name in names:
            if name not in known and name not in known.values():
                near = difflib.get_close_matches(name, [*known, *known.values()], n=1, cutoff=0.5)
                raise GateError(f"--provider {name!r} is in neither side{f': did you mean {near[0]}?' if near else ''}")
        chosen = {name for name, operator in known.items() if name in names or operator in names}
    points = {point: it for point, it in everything.items() if point.provider in chosen}
    absent = {side: Held("", _absence(its)) for side, its in held.items()}
    reasons = {point: {side: held[side].get(point, absent[side]).reason for side in (BASE, HEAD)} for point in points}
    on_both = [point for point in points if reasons[point] == {BASE: None, HEAD: None}]
    timed = dict.fromkeys(point.provider for point in on_both)
    changes, untimed = [], []
    for point, it in points.items():
        before, after = reasons[point][BASE], reasons[point][HEAD]
        if point.provider in timed:
            continue
        if before is None:
            changes.append(Change(point, it.operator, "gone", Sides(), reason=f"{HEAD}: {after}"))
        elif after is None:
            changes.append(Change(point, it.operator, "new", Sides(), reason=f"{BASE}: {before}"))
        else:
            untimed.append(Untimed(point, "unsupported", after if point in held[HEAD] else before))
    if not timed and not changes:
        found = "; ".join(dict.fromkeys(f"{it.point.provider}: {it.reason}" for it in untimed))
        raise GateError(f"no provider runs on both sides: {found}")
    return Choice(tuple(timed), len(on_both), changes, untimed)


def _absence(held: dict[Point, Held]) -> str:
    """What there is to say of a provider that a side does not have: entry points that gave none, if there are any."""
    broken = dict.fromkeys(it.reason for it in held.values() if it.operator == BrokenProvider.operator.name)
    return "; ".join(["it does not exist", *filter(None, broken)])


def describe(side: Side, spec: SweepSpec, folder: Path) -> dict[Point, Held]:
    """What a side has for the points of a sweep, of every provider it knows.

    Raises:
        GateError: when the code of the side is not what runs, or lacks what the gate needs.
    """
    with tempfile.TemporaryDirectory() as work:
        answer = Path(work) / "answer.json"
        side.run("describe", side_fields(spec), answer, folder / LOG_FILE)
        rows = json.loads(answer.read_text(encoding="utf-8"))
    return {
        Point(row["provider"], Workload.from_dict(row["workload"]), row["mode"], row["regime"]): Held(
            row["operator"], row["reason"]
        )
        for row in rows
    }


def side_fields(spec: SweepSpec) -> dict[str, Any]:
    """The fields of a specification that are not at their defaults: an older revision may lack the others."""
    defaults = {field.name: field.default for field in fields(SweepSpec)}
    return {name: value for name, value in spec.to_dict().items() if value != defaults[name]}


def machine(environment: Environment) -> dict[str, Any]:
    """What must agree before noise floors may be shared: hardware, threads, driver and compilers."""
    found = identity(environment)
    kept = {name: found.get(name) for name in ("device", "device_name", "torch", "triton", "driver")}
    return kept | {"threads": cpu_threads() if found.get("device") == "cpu" else None}


@contextlib.contextmanager
def _installed(gate: Gate, folder: Path, on_progress: Callable[[GateProgress], None]) -> Iterator[tuple[Side, Side]]:
    """Both sides in environments that last as long as the context."""
    repository = revisions.repository_root(gate.repository)
    for side, revision in ((BASE, gate.base), (HEAD, gate.head or "HEAD")):  # both, before the first takes its time
        revisions.commit_of(repository, f"--{side}", revision)
    with tempfile.TemporaryDirectory(prefix="mdnbench-gate-") as work:
        sides = []
        for side, revision in ((BASE, gate.base), (HEAD, gate.head)):
            on_progress(GateProgress(f"install {side}", 0, 0, None))
            sides.append(revisions.install(repository, side, revision, Path(work), folder / LOG_FILE))
        yield sides[0], sides[1]


def _measure(
    sides: tuple[Side, Side],
    spec: SweepSpec,
    pairs: int,
    round_number: int,
    folder: Path,
    on_progress: Callable[[GateProgress], None],
    run_block: RunBlock,
) -> list[MeasuredBlock]:
    """The blocks of one round."""
    by_name = {side.name: side for side in sides}
    blocks: list[MeasuredBlock] = []
    started = time.monotonic()
    first = 2 * pairs * round_number
    names = regress.order(pairs * (round_number + 1))[first:]
    for number, name in enumerate(names):
        left = (time.monotonic() - started) / number * (len(names) - number) if number else None
        on_progress(GateProgress(name, first + number, first + len(names), left))
        out = folder / f"{first + number:03d}-{name}"
        run_block(by_name[name], spec, out, folder / LOG_FILE)
        blocks.append(MeasuredBlock(name, read_records(out)))
    return blocks


def _run_sweep(side: Side, spec: SweepSpec, out: Path, log: Path) -> None:
    side.run("run", side_fields(spec), out, log, {"OMP_NUM_THREADS": cpu_threads()} if spec.device == "cpu" else None)


def cpu_threads() -> str:
    """How many threads a CPU block runs on: $OMP_NUM_THREADS, 1 where it is not set.

    Threads that wait for one another wait for whoever else uses the machine: on two cores with other work, times of
    the same code on two threads were seen to differ by a factor of 100, on one thread by up to a factor of 2.
    """
    return os.environ.get("OMP_NUM_THREADS") or "1"


def _notes(gate: Gate, sides: tuple[Side, Side], pairs: int, points: int) -> list[str]:
    base, head = sides
    notes = []
    if gate.spec.device == "cpu":
        notes.append(f"Times are the fastest of each block, on CPU threads: {cpu_threads()} (OMP_NUM_THREADS).")
    if base.source_hash == head.source_hash:
        notes.append(f"Both sides hold the same code ({base.source_hash[:12]}).")
    if gate.head is not None and (changed := revisions.changed_files(revisions.repository_root(gate.repository))):
        notes.append(
            f"The working tree has {len(changed)} changed files that --head {gate.head} does not hold: they were not "
            f"measured."
        )
    if 2 ** (1 - pairs) * points > paired.FALSE_DISCOVERY_RATE:
        needed = paired.pairs_needed(points)
        notes.append(f"{pairs} pairs cannot show that one of {points} points is slower: use --blocks {needed} or more.")
    return notes


def _facts(side: Side) -> dict[str, Any]:
    return {"label": side.label, "commit": side.commit, "packages": side.packages, "source_hash": side.source_hash}
