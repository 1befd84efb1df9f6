"""Presets: all load and can be planned, and say what they are for."""

from __future__ import annotations

from importlib import resources

import pytest

from mdnbench.baselines.registry import providers
from mdnbench.bench.presets import load_preset, make_spec, preset_names, resolve_device
from mdnbench.bench.spec import estimate_seconds, plan

GPU_PRESETS = ("ci-gpu", "long-context", "paper-1.3b", "paper-400m")
ALL = tuple(providers())


def spec_of(name: str, cuda_devices: int = 0, **changes):
    return make_spec({"name": name, "providers": ALL} | load_preset(name) | changes, cuda_devices)


def test_the_presets() -> None:
    assert preset_names() == ("ci", "ci-gpu", "long-context", "paper-1.3b", "paper-400m", "smoke")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_plans_on_a_gpu(name: str) -> None:
    spec = spec_of(name, cuda_devices=1)
    points = plan(spec)
    assert {point.provider for point in points} == set(ALL)
    assert {point.workload.device for point in points} == {"cuda"}
    assert {point.workload.dtype for point in points} == {"bfloat16"}
    assert len(set(points)) == len(points)
    assert estimate_seconds(points, spec) > 0


@pytest.mark.parametrize("name", [name for name in preset_names() if name != "ci-gpu"])
def test_every_preset_plans_on_a_cpu_that_is_asked_for(name: str) -> None:
    spec = spec_of(name, device="cpu")
    assert spec.regimes == ("eager",)
    assert len(plan(spec)) > 0


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_begins_with_what_it_is_for(name: str) -> None:
    text = (resources.files("mdnbench.bench") / "presets" / f"{name}.toml").read_text()
    first = text.splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 40


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_gpu_presets_need_a_gpu(name: str) -> None:
    with pytest.raises(ValueError, match=r"^--device 'cuda': PyTorch sees no GPU here; use --device cpu"):
        spec_of(name)


@pytest.mark.parametrize("name", ["long-context", "paper-1.3b", "paper-400m"])
def test_presets_of_real_shapes_hold_a_short_length(name: str) -> None:
    assert min(load_preset(name)["seq_lens"]) <= 512


def test_the_gate_on_a_gpu_replays_graphs_of_few_points() -> None:
    points = plan(make_spec({"name": "gate", "providers": ("mdn-triton",)} | load_preset("ci-gpu"), 1))
    assert {point.regime for point in points} == {"graph"}
    assert [point.mode for point in points] == ["forward", "forward_backward"]


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_gpu_presets_are_planned_without_a_gpu(name: str) -> None:
    values = {"name": name, "providers": ALL} | load_preset(name)
    assert make_spec(values, 0, planning=True) == make_spec(values, 1)


def test_smoke_covers_five_operators_three_lengths_two_dims_two_chunk_sizes_on_any_machine() -> None:
    spec = spec_of("smoke")
    assert (spec.device, spec.dtypes, spec.regimes) == ("cpu", ("float32",), ("eager",))
    points = plan(spec)
    operators = {providers()[point.provider].operator.name for point in points}
    assert operators == {"mdn", "gdn", "kda", "mamba2", "attention"}
    assert len({point.workload.seq_len for point in points}) == 3
    assert len({point.workload.head_dim_k for point in points}) == 2
    assert {point.workload.chunk_size for point in points} == {32, 64, None}
    assert {point.mode for point in points} == {"forward", "forward_backward"}
    runnable = [p for p in points if providers()[p.provider].supports(p.workload, p.mode) is None]
    assert estimate_seconds(runnable, spec) < 120


@pytest.mark.parametrize(("name", "batch", "dims"), [("paper-400m", 8, (128, 256)), ("paper-1.3b", 4, (256, 512))])
def test_paper_presets_have_the_shapes_of_the_paper(name: str, batch: int, dims: tuple[int, int]) -> None:
    spec = spec_of(name, cuda_devices=1)
    assert (spec.batch, spec.heads, spec.head_dims) == (batch, 6, (dims,))
    assert 4096 in spec.seq_lens
    assert spec.regimes == ("eager", "graph")


def test_long_context_reaches_128k() -> None:
    assert max(load_preset("long-context")["seq_lens"]) == 131072


def test_devices() -> None:
    assert resolve_device("auto", 0) == "cpu"
    assert resolve_device("auto", 2) == "cuda"
    assert resolve_device("cuda:1", 2) == "cuda:1"
    with pytest.raises(ValueError, match=r"^--device 'cuda:2': PyTorch sees 2 GPUs, numbered from 0"):
        resolve_device("cuda:2", 2)
    assert resolve_device("cuda:2", 2, planning=True) == "cuda:2"
    with pytest.raises(ValueError, match=r"^--device 'tpu' is unknown: choose cpu, cuda, cuda:N or auto"):
        resolve_device("tpu", 0)


def test_an_unknown_preset_is_answered_with_all() -> None:
    with pytest.raises(ValueError, match=r"^--preset 'fast' is unknown: choose from ci, ci-gpu, long-context"):
        load_preset("fast")
