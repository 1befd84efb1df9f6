"""What a search has found so far, as lines of JSON that survive it: each is on disk before the next candidate runs.

The first line says what is tuned and on what. A workload has a line with its incumbents, one for each stage of a
candidate, and one for each choice. Of the lines of a candidate the last one counts.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .results import now

SCHEMA_VERSION = 1
LOG_FILE = "tune.jsonl"
STATUSES = ("ok", "slower", "incorrect", "crashed", "timeout", "compile_error", "pruned")

Candidate = dict[str, Any]  # what a kernel is configured with: plain values, for JSON


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: registers and spilled bytes of a thread, shared memory and warps of a program."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int


@dataclass
class Trial:
    """What is known of a candidate.

    Attributes:
        stage: "checked" (right so far), "timed" (latency_ms of a short trial is there) or "done" (it has a status).
        status: one of `STATUSES`, with the reason, when done.
        compile_s: how long its compiler took, alone on its core.
    """

    tunable: str
    candidate: Candidate
    stage: str | None = None
    status: str | None = None
    reason: str | None = None
    latency_ms: float | None = None
    compile_s: float | None = None
    resources: list[Resources] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """What a search ended with.

    Attributes:
        tunable: its name.
        candidate: the choice: the incumbent, unless one beat it by more than the noise.
        latency_ms, incumbent_latency_ms: medians of the last comparison; None where there was none.
        ratio, ratio_low, ratio_high: time of the choice over that of the incumbent, with its 95 % interval.
        noise: how far from 1 such a ratio goes when both are the incumbent; None where it was not measured.
        runner_ups: the candidates that came next, the best first.
    """

    tunable: str
    candidate: Candidate
    latency_ms: float | None = None
    incumbent_latency_ms: float | None = None
    ratio: float = 1.0
    ratio_low: float | None = None
    ratio_high: float | None = None
    noise: float | None = None
    runner_ups: tuple[Candidate, ...] = ()


def key_of(tunable: str, candidate: Candidate) -> tuple[str, str]:
    """What tells candidates of all tunables apart."""
    return tunable, json.dumps(candidate, sort_keys=True)


class TuneLog:
    """Appends to the log of a folder, and knows what is in it.

    Args:
        folder: made when absent.
        head: what is tuned and on what, for the first line.
        resume: go on with the log that is there; else it must not be there.

    Raises:
        ValueError: when the log cannot be gone on with.
    """

    def __init__(self, folder: Path, head: dict[str, Any], resume: bool = False) -> None:
        self.path = folder / LOG_FILE
        self.trials: dict[tuple[str, str], Trial] = {}
        self.choices: dict[str, Choice] = {}
        self._incumbents: dict[str, dict[str, Candidate]] = {}
        head = json.loads(json.dumps(head))  # tuples become lists, as they are when read
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise ValueError(f"--out {str(folder)!r} cannot be written to ({fault.strerror})") from None
        if self.path.exists():
            if not resume:
                raise ValueError(
                    f"--out {str(folder)!r} holds a search already: add --resume, or choose another folder"
                )
            self._read(head)
        elif resume:
            raise ValueError(f"--resume: {folder} holds no search; give the folder of one by --out")
        self._file = self.path.open("ab")
        if self._file.tell() == 0:
            self._append({"kind": "head", "schema_version": SCHEMA_VERSION, **head})

    def _read(self, head: dict[str, Any]) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the process was killed within a line
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines()):
            try:
                row = json.loads(line)
                kind = row.pop("kind")
                row.pop("time")
                if kind == "head":
                    row.pop("schema_version")
                    for name in head:
                        if row.get(name) != head[name]:
                            raise ValueError(
                                f"--resume: the search in {self.path.parent} has {name} {row.get(name)}, not "
                                f"{head[name]}: start another one"
                            )
                elif kind == "start":
                    self._incumbents[row["workload"]] = row["incumbents"]
                elif kind == "choice":
                    row["runner_ups"] = tuple(row["runner_ups"])
                    self.choices[row["tunable"]] = Choice(**row)
                else:
                    row["resources"] = [Resources(**fields) for fields in row["resources"]]
                    trial = Trial(**row)
                    self.trials[key_of(trial.tunable, trial.candidate)] = trial
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"--resume: line {number + 1} of {self.path} is damaged: start in another folder"
                ) from None

    def incumbents(self, workload: str, now_in_use: dict[str, Candidate]) -> dict[str, Candidate]:
        """Those that the search for a workload began with: `now_in_use`, unless it goes on with one."""
        if workload not in self._incumbents:
            self._incumbents[workload] = now_in_use
            self._append({"kind": "start", "workload": workload, "incumbents": now_in_use})
        return self._incumbents[workload]

    def trial(self, tunable: str, candidate: Candidate) -> Trial:
        """What is known of a candidate; a new one when it is nothing."""
        return self.trials.setdefault(key_of(tunable, candidate), Trial(tunable, candidate))

    def put(self, trial: Trial) -> None:
        """Keep what is known of a candidate."""
        self.trials[key_of(trial.tunable, trial.candidate)] = trial
        self._append({"kind": "candidate", **asdict(trial)})

    def choose(self, choice: Choice) -> None:
        """Keep a choice."""
        self.choices[choice.tunable] = choice
        self._append({"kind": "choice", **asdict(choice)})

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def _append(self, row: dict[str, Any]) -> None:
        self._file.write((json.dumps({"time": now(), **row}) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
