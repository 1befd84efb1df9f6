"""Synthetic runs: five operators and their providers, with times that follow from the shapes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench.results import GpuReading, Point, Record
from mdnbench.reports.runs import Run

PROVIDERS = {
    "mdn-torch": ("mdn", 1.0),
    "gdn-torch": ("gdn", 0.7),
    "kda-torch": ("kda", 0.9),
    "mamba2-torch": ("mamba2", 0.5),
    "attention-flash": ("attention", 0.2),
    "attention-cudnn": ("attention", 0.15),
    "attention-efficient": ("attention", 0.4),
    "attention-math": ("attention", 1.2),
}
PEAKS = {"copy_bytes_per_s": 4.3e12, "matmul_flops_per_s": {"float32": 5e13, "bfloat16": 7.9e14}}
GPU_ONLY = ("attention-flash", "attention-cudnn")
ENVIRONMENT = {
    "device": "cpu",
    "device_name": "Some CPU 9000",
    "gpu": None,
    "torch": "2.13.0",
    "triton": "3.7.1",
    "mdnbench": "0.1.0",
    "git_commit": "0123456789abcdef",
    "git_dirty": True,
}


def make_record(provider: str, workload: Workload, mode: str, regime: str) -> Record:
    operator, factor = PROVIDERS[provider]
    common = {"operator": operator, "seed": 0, "time": "2026-01-31T12:00:00.000+00:00"}
    point = Point(provider, workload, mode, regime)
    if workload.device == "cpu" and provider in GPU_ONLY:
        return Record(point, status="unsupported", reason="runs on cuda only, not on cpu", **common)
    noise = random.Random(point.key)
    length = workload.seq_len if operator == "attention" else 64 + workload.chunk_size
    latency = 0.05 + factor * workload.tokens * length * workload.head_dim_k / 1e6 * (1 if mode == "forward" else 3)
    samples = tuple(latency * noise.gauss(1, 0.01) for _ in range(31))
    middle = sorted(samples)[15]
    return Record(
        point,
        status="ok",
        reason=None,
        samples_ms=samples,
        latency_ms=middle,
        latency_low_ms=middle * 0.995,
        latency_high_ms=middle * 1.005,
        tokens_per_s=workload.tokens / middle * 1e3,
        peak_memory_bytes=int(factor * workload.tokens * workload.head_dim_k * 16) + 2**20,
        relative_error={"o": 2e-7, "dq": 4e-7},
        precision=0.02,
        checked_seq_len=workload.seq_len,
        **common,
    )


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """make_run(name, ...) -> a Run over the grid of its arguments."""

    def make(
        name: str = "smoke",
        seq_lens=(128, 256, 512),
        head_dims=((32, 32), (64, 64)),
        chunk_sizes=(32, 64),
        modes=("forward", "forward_backward"),
        regimes=("eager",),
        providers=tuple(PROVIDERS),
        device="cpu",
        dtype="float32",
        heads=2,
    ) -> Run:
        records = [
            make_record(
                provider, Workload(t, k, v, heads=heads, chunk_size=c, dtype=dtype, device=device), mode, regime
            )
            for t in seq_lens
            for k, v in head_dims
            for mode in modes
            for regime in regimes
            for provider in providers
            for c in (chunk_sizes if PROVIDERS[provider][0] != "attention" else (None,))
        ]
        gpu = {"device": "cuda", "device_name": "NVIDIA H200", "gpu": {"driver": "580.12"}}
        return Run(name, records, ENVIRONMENT | (gpu if device == "cuda" else {}))

    return make


@pytest.fixture
def runs(make_run: Callable[..., Run]) -> list[Run]:
    """Two runs with counts, peaks in the first, a throttled row, a failed one and one with hostile text."""
    first, second = make_run("before", dtype="bfloat16"), make_run("after", seq_lens=(256, 512, 1024), dtype="bfloat16")
    records = [replace(r, flops=10**9 * r.point.workload.seq_len, bytes=10**7, precision=0.005) for r in first.records]
    held = (GpuReading("before"), GpuReading("during", 1200, power_w=700.0, slowed_by=("power cap",)))
    records[0] = replace(records[0], gpu=(held,), block_samples=(31,), input_sets=2, stop_reason="time limit")
    wrong = "</script><script>alert(1)</script> <b>o</b> is wrong"
    records[1] = replace(records[1], status="incorrect", reason=wrong, samples_ms=(), latency_ms=None)
    first = replace(first, records=records, environment=first.environment | {"peaks": PEAKS})
    return [first, second]
