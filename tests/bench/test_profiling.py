"""Profiles: what a Chrome trace of a GPU or a CPU comes to, and the command that records one."""

from __future__ import annotations

import gzip
import json

import pytest
from matplotlib.figure import Figure

from mdnbench.baselines.workload import Workload
from mdnbench.bench.cli import main
from mdnbench.bench.profiling import IDLE, OTHER, Profile, read_trace, stage_of
from mdnbench.reports import stages

WORKLOAD = {
    "batch": 1, "seq_len": 2048, "heads": 4, "value_heads": 4, "head_dim_k": 64, "head_dim_v": 64, "dtype": "bfloat16",
    "device": "cuda",
}  # fmt: skip


def event(category: str, name: str, start: float, duration: float, **more) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 7, **more}


def memory(size: int, device: int) -> dict:
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "args": {"Bytes": size, "Device Type": device}}


# Two calls on a GPU: in each 30 us prepare, a gap of 10, 40 us scan with 20 us of copy beside it on another stream.
GPU_TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        event("cuda_runtime", "cudaLaunchKernel", 0, 5),
        event("cpu_op", "aten::empty", 0, 3),
        event("gpu_user_annotation", "somebody's label", 100, 200),
        *(
            it
            for start in (100, 200)
            for it in (
                event("kernel", "prepare_fwd_kernel", start, 30),
                event("kernel", "scan_fwd_kernel", start + 40, 40),
                event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", start + 50, 20),
                memory(1 << 20, 1),
                memory(-(1 << 20), 1),
                memory(1 << 24, 0),
            )
        ),
    ]
}


def test_a_gpu_trace_comes_to_kernels_launches_gaps_and_bytes() -> None:
    found = read_trace(GPU_TRACE, "mdn-triton", "forward", WORKLOAD, 2)
    assert [(it.name.split()[0], it.launches, it.ms) for it in found.kernels] == [
        ("scan_fwd_kernel", 1, pytest.approx(0.040)),
        ("prepare_fwd_kernel", 1, pytest.approx(0.030)),
        ("Memcpy", 1, pytest.approx(0.020)),
    ]
    assert found.launches == 3
    assert found.span_ms == pytest.approx(0.090)  # from 100 to 280
    assert found.busy_ms == pytest.approx(0.070)  # the copy beside the scan takes no time of its own
    assert found.idle_ms == pytest.approx(0.020)  # 10 in each call and 20 between the two
    assert found.allocated_bytes == 1 << 20
    assert sum(found.stages.values()) == pytest.approx(found.span_ms)
    assert found.stages["across chunks"] == pytest.approx(0.040 * 70 / 90)
    assert found.stages[IDLE] == found.idle_ms


def test_operators_of_a_cpu_count_less_what_runs_inside_of_them() -> None:
    trace = {
        "traceEvents": [
            event("cpu_op", "aten::matmul", 0, 100),
            event("cpu_op", "aten::bmm", 10, 60),
            event("cpu_op", "aten::empty", 20, 5),
            event("cpu_op", "aten::mul", 120, 30),
            event("cpu_op", "aten::view", 121, 0),
            event("cpu_op", "aten::exp", 130, 40, tid=8),
            memory(100, 0),
        ]
    }
    found = read_trace(trace, "x", "forward", WORKLOAD | {"device": "cpu"}, 1)
    own = {it.name.removeprefix("aten::"): it.ms * 1e3 for it in found.kernels}
    assert own == pytest.approx({"matmul": 40, "bmm": 55, "empty": 5, "mul": 30, "exp": 40})
    assert found.span_ms * 1e3 == pytest.approx(170)
    assert found.idle_ms * 1e3 == pytest.approx(20)  # from 100 to 120
    assert found.allocated_bytes == 100
    with pytest.raises(ValueError, match="x: the trace holds nothing that ran on cuda"):
        read_trace(trace, "x", "forward", WORKLOAD, 1)


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("gates and sums", ["gates_fwd_kernel", "chunk_local_cumsum_scalar_kernel", "_chunk_cumsum_fwd_kernel"]),
        (
            "within chunks",
            [
                "prepare_fwd_kernel",
                "chunk_scaled_dot_kkt_fwd_kernel",
                "merge_16x16_to_64x64_inverse_kernel",
                "recompute_w_u_fwd_kernel",
                "_bmm_chunk_fwd_kernel",
                "gradients_bwd_kernel",
                "aten::linalg_solve_triangular",
            ],
        ),
        (
            "across chunks",
            [
                "scan_fwd_kernel",
                "states_bwd_kernel",
                "recurrent_fwd_kernel",
                "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
                "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
                "_state_passing_fwd_kernel",
            ],
        ),
        ("outputs", ["chunk_fwd_kernel_o", "_chunk_scan_fwd_kernel", "chunk_bwd_kernel_dqkwg"]),
        ("attention", ["pytorch_flash::flash_fwd_kernel<...>", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"]),
        ("matrix products", ["nvjet_tst_128x64_64x9_1x2_h_bz_TNT", "aten::bmm", "sm90_xmma_gemm_bf16bf16"]),
        ("copies", ["Memcpy DtoD (Device -> Device)", "aten::copy_", "Memset (Device)"]),
        ("elementwise and sums", ["void at::native::vectorized_elementwise_kernel<4, ...>", "aten::mul", "aten::sum"]),
        ("autograd", ["_ChunkMDNBackward", "autograd::engine::evaluate_function: MulBackward0"]),
        (OTHER, ["aten::roll"]),
    ],
)
def test_stages_by_name(stage: str, names: list[str]) -> None:
    assert {name: stage_of(name) for name in names} == dict.fromkeys(names, stage)


def test_the_figure_has_a_bar_a_provider_that_adds_up(tmp_path) -> None:
    profiles = [read_trace(GPU_TRACE, name, "forward", WORKLOAD, 2).to_dict() for name in ("mdn-triton", "gdn-fla")]
    figure = stages.draw(profiles)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mdn-triton\n3 launches", "gdn-fla\n3 launches"]
    widths = [patch.get_width() for patch in axes.patches]
    assert sum(widths) == pytest.approx(2 * 0.090)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[-1] == "idle"
    assert {"across chunks", "within chunks", "copies"} == set(names[:-1])
    assert "T 2k, H 4, K 64, V 64, bfloat16, cuda" in axes.get_title()
    assert [path.name for path in stages.write_plots(profiles, tmp_path)] == ["stages.png", "stages.svg"]


def test_a_profile_is_recorded_and_saved_with_its_trace(tmp_path, capsys) -> None:
    arguments = ["profile", "gdn-torch,attention-sdpa-cudnn", "--seq-len", "64", "--head-dim", "16", "--calls", "2"]
    arguments += ["--mode", "forward_backward", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "gdn-torch, forward_backward: " in printed.out
    assert "outside of operators" in printed.out
    assert "mdnbench: attention-sdpa-cudnn: runs on cuda only, not on cpu" in printed.err
    (row,) = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert set(row) == set(Profile.__dataclass_fields__)
    names = {kernel["name"] for kernel in row["kernels"]}
    assert {"aten::bmm", "aten::mul"} <= names
    assert row["allocated_bytes"] > 10_000
    assert 0 < row["busy_ms"] <= row["span_ms"]
    assert sum(row["stages"].values()) == pytest.approx(row["span_ms"])
    with gzip.open(tmp_path / "out" / "trace-gdn-torch.json.gz", "rt") as file:
        assert any(it.get("name") == "aten::bmm" for it in json.load(file)["traceEvents"])
    assert (tmp_path / "out" / "stages.svg").stat().st_size > 5000


def test_a_profile_may_have_more_value_heads_than_query_heads(tmp_path) -> None:
    arguments = "profile mamba2-torch --seq-len 32 --head-dim 8 --heads 1 --value-heads 3 --calls 1 --device cpu"
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "profile.json").read_text())
    assert (row["workload"]["heads"], row["workload"]["value_heads"]) == (1, 3)


@pytest.mark.parametrize(
    ("options", "batch", "seq_len", "head_dim_k", "head_dim_v", "heads", "chunk_size"),
    [
        ("--preset ci", 1, 100, 16, 32, 2, 32),
        ("--preset ci --seq-len 32 --batch 2 --heads 1", 2, 32, 16, 32, 1, 32),
        ("--preset ci --seq-len 32 --head-dim 8", 1, 32, 8, 8, 2, 32),
    ],
)
def test_the_workload_may_be_that_of_a_preset(
    options: str, batch: int, seq_len: int, head_dim_k: int, head_dim_v: int, heads: int, chunk_size: int, tmp_path
) -> None:
    arguments = f"profile mamba2-torch {options} --calls 1 --device cpu"
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "profile.json").read_text())
    expected = Workload(seq_len, head_dim_k, head_dim_v, batch=batch, heads=heads, chunk_size=chunk_size)
    assert Workload.from_dict(row["workload"]) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("profile", "Missing argument 'PROVIDER...'"),
        ("profile nothing-like-it", "PROVIDER 'nothing-like-it' is unknown"),
        ("profile mdn-torch --seq-len 1k,2k", "--seq-len '1k,2k': a profile has one workload"),
        ("profile mdn-torch --dtype float32,float16", "--dtype 'float32,float16': give one dtype here"),
        ("profile mdn-torch --heads 2 --value-heads 3", "--value-heads 3 is not a multiple of --heads 2: use 2, 4"),
        ("profile mdn-torch --preset fast", "--preset 'fast' is unknown: choose from ci, ci-gpu"),
        ("profile mdn-torch --mode all", "--mode 'all' is unknown"),
        ("profile mdn-torch --calls 0", "--calls '0' is not a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: str, words: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert list(tmp_path.iterdir()) == []
