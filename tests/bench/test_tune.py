"""Tuning the MDN kernels without a GPU: compiled for one, run by Triton's interpreter; what ends in the store."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdnbench.baselines.workload import Workload
from mdnbench.bench import cli_tune, tune, tune_views
from mdnbench.bench.tune_interface import Settings
from mdnbench.bench.tune_log import Choice, Resources, TuneLog
from mdnbench.kernels import store
from mdnbench.kernels.space import SPACE

GPU = store.Gpu("Triton's interpreter", "9.0", 232448, 132)
H200 = store.Gpu("NVIDIA H200", "9.0", 232448, 132)
SMALL = Workload(20, 16, 16, batch=1, heads=1, chunk_size=16, dtype="float16", device="cpu")
REAL = Workload(4096, 128, 128, batch=4, heads=16, dtype="bfloat16", device="cuda")
FAST = Settings(jobs=1, spare=False, rounds=6, trial_s=0.01, block_s=0.01)

pytestmark = pytest.mark.usefixtures("nothing_stored")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets where there is no GPU")


def incumbents(workload: Workload, gpu: store.Gpu) -> dict:
    return {direction: tune.in_use(workload, direction, gpu)[0] for direction in tune.DIRECTIONS}


def kernels(workload: Workload = SMALL, gpu: store.Gpu = GPU, profiles=("mild", "reset=-inf")):
    found = tune.kernels_of(workload, gpu, incumbents(workload, gpu), profiles)
    return {f"{it.direction} {it.kernel}": it for it in found}


@interpreted
def test_a_search_ends_in_the_store_and_is_verified(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tune, "DIRECTIONS", ("forward",))
    log = TuneLog(tmp_path / "run", {})

    def two_of_prepare(found):
        (prepare,) = (it for it in found if it.kernel == "prepare")
        other = dict(prepare.base) | {"prepare_warps": 8}
        return [replace(prepare, others=(tuple(other.items()),))]

    choices = tune.tune(SMALL, GPU, log, FAST, lambda it: None, two_of_prepare, profiles=("mild",))
    log.close()
    (choice,) = choices
    assert choice.tunable == f"forward all {SMALL.label()}"
    assert choice.latency_ms > 0
    of_prepare = [it for it in log.trials.values() if it.tunable.startswith("forward prepare")]
    assert len(of_prepare) == 2
    for trial in log.trials.values():
        assert trial.status in ("ok", "slower"), trial
    assert all(isinstance(it, Resources) and it.registers > 16 for trial in of_prepare for it in trial.resources)
    assert [it.kernel for it in of_prepare[0].resources] == ["prepare_fwd_kernel"]
    assert [it.num_warps for it in of_prepare[1].resources] == [8]

    config, source, entry = tune.in_use(SMALL, "forward", GPU)
    assert (config, source, entry.latency_ms) == (choice.candidate, "user, tuned", choice.latency_ms)
    assert entry.versions == store.installed_versions("9.0")
    assert dict(entry.runner_ups[0]) != config
    # A call for another length finds the same entry, with words on where it comes from.
    assert "it uses what was found for" in tune.in_use(SMALL.with_(seq_len=8 * SMALL.seq_len), "forward", GPU)[1]

    monkeypatch.setattr(tune, "distinct_profiles", lambda operator: ["mild"])
    log = TuneLog(tmp_path / "verify", {})
    (verified,) = tune.verify(SMALL, GPU, log, FAST, lambda it: None)
    log.close()
    assert verified.incumbent_latency_ms is not None
    assert len(log.trials) == 2
    assert tune_views.words(verified, log) == "the incumbent" or verified.ratio < 1


def test_what_nothing_was_compared_with_is_not_stored(tmp_path: Path, monkeypatch) -> None:
    """Out of time, a direction has no candidate beside its incumbent."""
    searched = []

    class NoTime:
        def __init__(self, tunables, log, settings, watch, runner):
            searched.append([it.name for it in tunables])
            self.trials = [log.trial(it.name, candidate) for it in tunables for candidate in it.candidates()]

        def run(self):
            return []

    monkeypatch.setattr(tune, "Search", NoTime)
    log = TuneLog(tmp_path / "run", {})
    assert tune.tune(REAL, H200, log, replace(FAST, seconds=1.0), lambda it: None) == []
    assert searched[1] == []
    assert tune.unfinished(log, REAL, "forward")
    assert not store.user_folder().exists()
    # Where every candidate was tried and none but the incumbent is right, it is the choice.
    for trial in log.trials.values():
        trial.stage, trial.status = "done", "incorrect"
    tune.tune(REAL, H200, log, FAST, lambda it: None)
    log.close()
    assert searched[-1] == [f"{direction} all {REAL.label()}" for direction in tune.DIRECTIONS]


@interpreted
def test_the_check_is_of_both_directions_against_float64() -> None:
    found = kernels(profiles=("reset=-inf",))
    for name in ("forward scan", "backward scan"):
        assert found[name].check(dict(found[name].base)) is None


@interpreted
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda x, calls: x.mul_(1.1), "has a relative error of 0.1 at mild"),
        (lambda x, calls: x[..., -1].fill_(torch.nan), "holds NaN or infinity at mild"),
        (lambda x, calls: x.view(-1)[0].add_(1e-3 * calls), "differs between two calls on the same inputs at mild"),
    ],
    ids=["wrong", "not written", "not repeatable"],
)
def test_wrong_results_are_said_with_tensor_and_profile(monkeypatch, fault, reason: str) -> None:
    calls = []
    run = tune.forward.chunk_forward

    def faulty(**arguments):
        calls.append(1)
        result = run(**arguments)
        fault(result.o, len(calls))
        return result

    monkeypatch.setattr(tune.forward, "chunk_forward", faulty)
    scan = kernels()["forward scan"]
    assert scan.check(dict(scan.base)).startswith(f"o {reason}")


@interpreted
def test_a_whole_forward_is_checked_without_gradients_too(monkeypatch) -> None:
    run = tune.forward.chunk_forward

    def faulty(**arguments):
        result = run(**arguments)
        if not arguments["keep_errors"]:
            result.o.mul_(1.1)
        return result

    monkeypatch.setattr(tune.forward, "chunk_forward", faulty)
    scan = kernels(profiles=("mild",))["forward scan"]
    assert scan.check(dict(scan.base)) is None
    whole = replace(scan, kernel=None, others=())
    assert whole.check(dict(scan.base)).startswith("o has a relative error of 0.1 at mild")


@interpreted
def test_one_kernel_is_launched_alone() -> None:
    found = kernels()
    for name, launched in (("forward prepare", 1), ("backward gradients", 1)):
        call = found[name].run(dict(found[name].base))
        assert len(call.args[0]) == launched
        assert {launch.kernel.__name__ for launch, _ in call.args[0]} == set(found[name]._wanted())
        call()


def test_the_choices_of_kernels_are_put_together() -> None:
    found = kernels(REAL, H200)
    base = dict(found["forward scan"].base)
    scan, prepare = {**base, "block_v": 64}, {**base, "prepare_warps": 8}
    choices = [
        Choice(found["forward scan"].name, scan, runner_ups=({**base, "block_v": 16},)),
        Choice(found["forward prepare"].name, prepare),
    ]
    forward, backward = tune.together(list(found.values()), choices)
    assert forward.candidates() == [
        base, {**base, "block_v": 64, "prepare_warps": 8}, {**base, "block_v": 16, "prepare_warps": 8},
    ]  # fmt: skip
    assert backward.candidates() == [dict(backward.base)]  # nothing was found: the incumbent alone
    assert forward.label(scan) == "block_v=64"
    assert found["forward scan"].label(scan).startswith("block_v=64 scan_warps=")


def test_every_kernel_of_the_real_shapes_has_candidates() -> None:
    for workload in cli_tune.shapes_of(None, dict.fromkeys(("batch",))):
        found = kernels(workload, H200)
        assert set(found) == {f"{direction} {kernel}" for direction in SPACE for kernel in SPACE[direction]}
        counts = {name: len(it.candidates()) for name, it in found.items()}
        assert all(2 <= count <= 96 for count in counts.values())
        assert sum(counts.values()) < 300
