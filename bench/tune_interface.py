"""What the tuner has to know of a kernel, the limits of a search, and what it tells of its progress. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .tune_log import Candidate, Resources


class Tunable:
    """What the tuner has to know of a kernel on one problem. Pickled to the processes: it holds sizes, not tensors.

    Attributes:
        name: unique in a search.
        device: where candidates run: "cpu", "cuda" or "cuda:N".
        shared_memory_bytes: a program may use; None for no limit.
        run_variables: of the environment of the process that checks and times.
        compiled_first: whether to compile candidates apart; else they are, when they run for the first time.
    """

    name: str = ""
    device: str = "cpu"
    shared_memory_bytes: int | None = None
    run_variables: dict[str, str | None] = {}  # noqa: RUF012 - an attribute as the others
    compiled_first: bool = True

    def candidates(self) -> Sequence[Candidate]:
        """All candidates, the incumbent first."""
        raise NotImplementedError

    def compile(self, candidate: Candidate) -> list[Resources]:
        """Compile, launching nothing, in a process that needs no GPU; what the compiled kernels need."""
        return []

    def run(self, candidate: Candidate) -> Callable[[], object]:
        """The function whose calls are timed."""
        raise NotImplementedError

    def check(self, candidate: Candidate) -> str | None:
        """Run on fresh inputs: one sentence on what is wrong with the results, None when they are right."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """What a process that runs candidates does before the first: what would take time from its limit."""

    def label(self, candidate: Candidate) -> str:
        """A candidate for people."""
        return " ".join(f"{name}={value}" for name, value in candidate.items())


@dataclass(frozen=True)
class Settings:
    """How long a search may take for what.

    Attributes:
        jobs: processes that compile.
        seconds: for all of it; None for as long as it takes. Compiling and checks stop after 60 % of it, trials after
            80 %: what is left out is tried by a search that goes on with this one.
        compile_limit_s, check_limit_s, sample_limit_s: of one candidate.
        trial_s: of sampling a candidate before the finals.
        finalists: beside the incumbent.
        rounds, block_s: of the finals: blocks of samples of each finalist, and seconds a block.
        spare: whether a started process stands by for the one that dies.
    """

    jobs: int = 1
    seconds: float | None = None
    compile_limit_s: float = 120.0
    check_limit_s: float = 120.0
    sample_limit_s: float = 30.0
    trial_s: float = 0.04
    finalists: int = 3
    rounds: int = 12
    block_s: float = 0.02
    max_samples: int = 200
    spare: bool = True


@dataclass
class Progress:
    """What a person is shown: candidates by status, the best so far by tunable, and the rest in words."""

    total: int
    phase: str = "starting"
    counts: Counter[str] = field(default_factory=Counter)
    best: dict[str, str] = field(default_factory=dict)
    done: int = 0  # of the present phase
    of: int = 0
    seconds_left: float | None = None
