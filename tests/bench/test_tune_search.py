"""The tuner's search: every way a candidate can fail, what an end in the middle leaves, and who wins."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # for the toys, which the processes of the tuner find by the same path

import toy_triton  # noqa: E402
import toy_tuning  # noqa: E402

from mdnbench.bench.tune_interface import Progress, Settings  # noqa: E402
from mdnbench.bench.tune_log import LOG_FILE, TuneLog  # noqa: E402
from mdnbench.bench.tune_search import Search  # noqa: E402

FAST = {"jobs": 2, "trial_s": 0.02, "block_s": 0.02, "rounds": 8, "spare": False}
HEAD = {"what": "toys"}


def search(folder: Path, tunable, resume: bool = False, head=HEAD, **settings):
    """The choices of a search, its trials by fault or block, and what it told."""
    told: list[str] = []
    log = TuneLog(folder, head, resume)
    try:
        run = Search(
            [tunable], log, Settings(**{**FAST, **settings}), lambda it: told.append(f"{it.phase} {dict(it.counts)}")
        )
        return run.run(), [log.trial(tunable.name, it) for it in tunable.candidates()], told
    finally:
        log.close()


def test_each_fault_has_its_status_and_costs_no_other_candidate(tmp_path: Path) -> None:
    faults = {
        "": ("slower", "choice takes 0."),
        "none": ("ok", "chosen: 0."),
        "slow": ("slower", "ms in the trial"),
        "wrong": ("incorrect", "o has a relative error of 0.3"),
        "reads address 8": ("crashed", "killed by SIGSEGV during the check"),
        "hangs": ("timeout", "limit of 2 s for the check"),
        "asserts": ("crashed", "AssertionError: index out of range"),
        "dies when timed": ("crashed", "ended with exit code 3 during the timed calls"),
        "does not compile": ("compile_error", "ValueError: unexpected token"),
        "needs many registers": (
            "compile_error",
            "RuntimeError: PTXAS error: Internal Triton PTX codegen error ... ptxas fatal : (C7602) Insufficient "
            "registers (128) to compile instruction at line 9",
        ),
        "kills the compiler": ("compile_error", "killed by SIGABRT during compiling"),
        "compiles for ever": ("timeout", "limit of 2 s for compiling"),
        "spills": ("pruned", "toy_kernel spills 300 bytes a thread, 256 are allowed"),
        "needs much memory": ("pruned", "toy_kernel needs 2000 bytes of shared memory, the GPU has 1000"),
    }
    waits = {"": 6.0, "none": 2.0, "slow": 15.0}
    toy = toy_tuning.Toy(tuple((fault, waits.get(fault, 6.0)) for fault in faults))
    choices, trials, told = search(tmp_path, toy, compile_limit_s=2, check_limit_s=2, finalists=1)
    for (status, reason), trial in zip(faults.values(), trials, strict=True):
        assert trial.status == status, trial
        assert reason in trial.reason, trial
    (choice,) = choices
    assert choice.candidate["fault"] == "none"
    assert 0.2 < choice.ratio < 0.7
    assert choice.ratio_low <= choice.ratio <= choice.ratio_high < 1
    assert choice.latency_ms < choice.incumbent_latency_ms
    assert choice.runner_ups == ({"fault": "", "wait_ms": 6.0},)
    assert told[-1].startswith("finals")
    assert "'crashed': 3" in told[-1]


def test_the_incumbent_keeps_its_place_within_the_noise(tmp_path: Path) -> None:
    choices, trials, _ = search(tmp_path, toy_tuning.Toy((("", 2.0), ("none", 2.0))))
    assert choices[0].candidate["fault"] == ""
    assert choices[0].noise is not None
    assert [trial.status for trial in trials] == ["ok", "ok"] or trials[1].status == "slower"


def test_where_the_incumbent_is_wrong_the_best_that_is_right_wins(tmp_path: Path) -> None:
    choices, trials, _ = search(tmp_path, toy_tuning.Toy((("wrong", 0.1), ("none", 2.0), ("slow", 6.0))))
    assert choices[0].candidate["fault"] == "none"
    assert choices[0].incumbent_latency_ms is None
    assert trials[0].status == "incorrect"


def test_where_none_is_right_there_is_no_choice(tmp_path: Path) -> None:
    choices, trials, _ = search(tmp_path, toy_tuning.Toy((("wrong", 0.1),)))
    assert choices == []
    assert trials[0].status == "incorrect"


KILLED = """
import sys, toy_tuning
from pathlib import Path
from mdnbench.bench.tune_interface import Settings
from mdnbench.bench.tune_log import TuneLog
from mdnbench.bench.tune_search import Search
toy = toy_tuning.Toy((("", 6.0), ("none", 2.0), ("wrong", 6.0), ("waits to be killed", 6.0)), marks=sys.argv[2])
Search([toy], TuneLog(Path(sys.argv[1]), {"what": "toys"}), Settings(jobs=1, spare=False), lambda it: None).run()
"""


def rows(folder: Path) -> list[dict]:
    path = folder / LOG_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_what_was_found_survives_the_end_and_is_not_done_again(tmp_path: Path, with_signal: int) -> None:
    marks = tmp_path / "marks"
    code = KILLED.replace("import sys,", f"import sys; sys.path.append({str(HERE)!r}); import")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(marks)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (marks.exists() and marks.read_text().count("k") == 4) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(with_signal)
    process.wait(timeout=20)
    before = rows(tmp_path)
    assert [row.get("stage") for row in before] == [None, "checked", "checked", "done"]
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"kind": "candidate", "tun')  # a line that was cut
    marks.write_text("")
    toy = toy_tuning.Toy((("", 6.0), ("none", 2.0), ("wrong", 6.0), ("waits to be killed", 6.0)), marks=str(marks))
    choices, trials, _ = search(tmp_path, toy, resume=True, check_limit_s=1)
    assert marks.read_text() == "ck"  # the one that was under way
    assert choices[0].candidate["fault"] == "none"
    assert [trial.status for trial in trials] == ["slower", "ok", "incorrect", "timeout"]
    assert rows(tmp_path)[: len(before)] == before
    # A search that is over does nothing more.
    assert search(tmp_path, toy, resume=True)[0] == choices
    assert marks.read_text() == "ck"
    with pytest.raises(ValueError, match="has what toys, not kernels: start another one"):
        search(tmp_path, toy, resume=True, head={"what": "kernels"})
    with pytest.raises(ValueError, match="holds a search already: add --resume"):
        search(tmp_path, toy)


def test_out_of_time_the_rest_is_left_to_a_search_that_goes_on(tmp_path: Path) -> None:
    toy = toy_tuning.Toy((("", 6.0), *((f"none {number}", 2.0) for number in range(4))))
    choices, trials, _ = search(tmp_path, toy, seconds=1e-3)
    assert choices == []
    assert any(trial.stage is None for trial in trials)
    choices, trials, _ = search(tmp_path, toy, resume=True)
    assert choices[0].candidate["fault"].startswith("none")
    assert all(trial.stage == "done" for trial in trials)


def test_a_plain_triton_kernel_is_tuned_through_the_same_interface(tmp_path: Path) -> None:
    kernel = toy_triton.PlainTriton()
    choices, trials, _ = search(tmp_path, kernel)
    assert [trial.status for trial in trials][2] == "compile_error"
    assert "must be a power of 2" in trials[2].reason
    assert all(trial.status in ("ok", "slower") for trial in trials[:2])
    assert trials[0].resources[0].registers > 0  # compiled for a GPU, run by the interpreter where there is none
    if kernel.device == "cpu":
        assert choices[0].candidate == {"BLOCK": 1024, "num_warps": 4}  # one program in place of eight


def test_progress_counts_every_candidate(tmp_path: Path) -> None:
    seen: list[Progress] = []
    log = TuneLog(tmp_path, HEAD)
    toy = toy_tuning.Toy((("", 0.2), ("wrong", 0.2)))
    Search([toy], log, Settings(**FAST, seconds=100), lambda it: seen.append(it) or None).run()
    log.close()
    last = seen[-1]
    assert sum(last.counts.values()) == last.total == 2
    assert last.best["toy"].endswith(" ms")
    assert 0 <= last.seconds_left <= 100
    assert os.path.exists(tmp_path / "worker.log")
