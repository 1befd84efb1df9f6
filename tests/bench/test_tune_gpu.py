"""The tuner on a GPU: what is compiled without one is what runs, and an illegal access costs one candidate."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # for the toys, which the processes of the tuner find by the same path

import toy_triton

from mdnbench.baselines.workload import Workload
from mdnbench.bench import tune
from mdnbench.bench.tune_interface import Settings
from mdnbench.bench.tune_log import TuneLog
from mdnbench.bench.tune_search import Runner, Search
from mdnbench.bench.tune_worker import Request, TuneWorker
from mdnbench.kernels import store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
WORKLOAD = Workload(512, 64, 64, batch=2, heads=4, dtype="bfloat16", device="cuda")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch) -> None:
    """Nothing is stored, and nothing is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    store.forget()
    yield
    store.forget()


def kernel(name: str) -> tune.MdnKernel:
    gpu = store.gpu_of(0)
    incumbents = {direction: tune.in_use(WORKLOAD, direction, gpu)[0] for direction in tune.DIRECTIONS}
    found = tune.kernels_of(WORKLOAD, gpu, incumbents, ("mild",))
    return next(it for it in found if it.name.startswith(name))


@pytest.mark.parametrize(
    ("name", "code"), [("forward scan", "scan_fwd_kernel"), ("backward gradients", "gradients_bwd_kernel")]
)
def test_the_first_launch_finds_what_was_compiled_without_a_gpu(tmp_path: Path, name: str, code: str) -> None:
    def compiled() -> list[Path]:
        return sorted((tmp_path / "triton").rglob(f"{code}.cubin"))

    it = kernel(name)
    log = TuneLog(tmp_path, {})
    worker = TuneWorker(it, tmp_path / "log", {})
    assert worker.ask(Request("compile", it, dict(it.base)), 120)[0].kernel == code
    worker.stop()
    before = compiled()
    assert len(before) == 1
    runner = Runner(log, spare=False)
    try:
        assert runner.ask(Request("check", it, dict(it.base)), 120) is None
        assert min(runner.ask(Request("sample", it, dict(it.base), 0.05, 50), 60)) > 0
    finally:
        runner.stop()
        log.close()
    assert compiled() == before


def test_an_illegal_access_costs_one_candidate(tmp_path: Path) -> None:
    log = TuneLog(tmp_path, {})
    far = toy_triton.WritesFar()
    Search([far], log, Settings(rounds=6), lambda it: None).run()
    statuses = [log.trial(far.name, it).status for it in far.candidates()]
    assert statuses[1] == "crashed"
    assert {statuses[0], statuses[2]} <= {"ok", "slower"}
    log.close()


def test_a_search_of_both_directions_ends_in_the_store(tmp_path: Path) -> None:
    gpu = store.gpu_of(0)
    log = TuneLog(tmp_path, {})

    def few(found):
        chosen = [it for it in found if it.kernel in ("prepare", "attention")]
        return [replace(it, others=tuple(tuple(c.items()) for c in it.candidates()[1:2])) for it in chosen]

    choices = tune.tune(WORKLOAD, gpu, log, Settings(jobs=4, rounds=6), lambda it: None, few, profiles=("mild",))
    log.close()
    assert len(choices) == 2
    for direction, choice in zip(tune.DIRECTIONS, choices, strict=True):
        assert 0 < choice.latency_ms < 10
        assert tune.in_use(WORKLOAD, direction, gpu)[0] == choice.candidate
