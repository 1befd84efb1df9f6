"""Tables: what is best, what is summarised, what reads well."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from mdnbench.bench.results import GpuReading, append_record
from mdnbench.reports import latex, render, style, tables
from mdnbench.reports.runs import Run, describe, load_run, load_runs

MakeRun = Callable[..., Run]


def shown(runs: list[Run], terminal: bool, width: int = 80) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width if terminal else 400, _environ={})
    render.show(console, runs)
    return console.file.getvalue()


def with_times(run: Run, times: dict[str, tuple[float, float]]) -> Run:
    """The run with (median, half interval) in ms by provider."""
    records = []
    for record in run.records:
        middle, half = times[record.point.provider]
        records.append(
            replace(record, samples_ms=(middle,), latency_low_ms=middle - half, latency_high_ms=middle + half)
        )
    return Run(run.name, records, run.environment)


def best_times(run: Run) -> dict[str, bool]:
    """Whether the time of a provider is marked as best."""
    (block,) = tables.blocks(tables.to_rows([run]))
    provider, time = block.header.index("provider"), block.header.index("time ms")
    return {row[provider].text: row[time].best for row in block.rows}


def test_one_block_an_operator_and_one_row_a_point(make_run: MakeRun) -> None:
    rows = tables.to_rows([make_run()])
    blocks = tables.blocks(rows)
    assert [block.title for block in blocks] == [
        "Momentum DeltaNet (mdn-torch)",
        "Gated DeltaNet (gdn-torch)",
        "Kimi Delta Attention (kda-torch)",
        "Mamba-2 (mamba2-torch)",
        "Softmax attention (attention)",
    ]
    assert sum(len(block.rows) for block in blocks) == sum(row["status"] == "ok" for row in rows)
    assert blocks[0].header == ["K=V", "T", "mode", "C", "time ms", "tokens/s", "MiB", "error"]
    assert blocks[4].header == ["K=V", "T", "mode", "provider", "time ms", "tokens/s", "MiB", "error"]


def test_best_is_the_fastest_of_a_problem_and_ties_share_it(make_run: MakeRun) -> None:
    names = ("attention-efficient", "attention-math", "attention-flash")
    run = make_run(seq_lens=(512,), head_dims=((64, 64),), modes=("forward",), providers=names, device="cuda")
    apart = {"attention-efficient": (1.0, 0.1), "attention-math": (2.0, 0.1), "attention-flash": (3.0, 0.1)}
    assert best_times(with_times(run, apart)) == {names[0]: True, names[1]: False, names[2]: False}
    overlapping = apart | {"attention-math": (1.15, 0.1)}
    assert best_times(with_times(run, overlapping)) == {names[0]: True, names[1]: True, names[2]: False}
    assert not any(best_times(with_times(run, dict.fromkeys(names, (1.0, 0.1)))).values())


def test_best_never_compares_modes_lengths_or_devices(make_run: MakeRun) -> None:
    cpu = make_run(providers=("mdn-torch",), chunk_sizes=(64,))
    gpu = make_run("h200", providers=("mdn-torch",), chunk_sizes=(64,), device="cuda")
    (block,) = tables.blocks(tables.to_rows([cpu, gpu]))
    assert len(block.rows) == len(cpu.records) + len(gpu.records)
    assert not any(cell.best for row in block.rows for cell in row)


def test_points_without_a_time_are_counted_by_reason(make_run: MakeRun) -> None:
    run = make_run()
    crashed = replace(run.records[0], status="crashed", reason="the worker ended by signal 11\nmore", samples_ms=())
    rows = tables.to_rows([Run(run.name, [crashed, *run.records[1:]], run.environment)])
    crash, unsupported = tables.failures(rows)
    assert (crash.status, crash.count, crash.reason) == ("crashed", 1, "the worker ended by signal 11")
    assert unsupported.count == 24
    assert unsupported.providers == ("attention-flash", "attention-cudnn")
    assert tables.counts(rows) == "144 points: 119 ok, 24 unsupported, 1 crashed"
    assert "  24 unsupported: attention-flash, attention-cudnn: runs on cuda only, not on cpu" in shown(
        [run], terminal=False
    )


def test_plain_text_has_no_escapes_and_one_line_a_row(make_run: MakeRun) -> None:
    text = shown([make_run()], terminal=False)
    assert "\x1b" not in text
    assert not set(text) & set("│─┃━┏┓╇┡")
    slow, fast = (
        next(line for line in text.splitlines() if line.split()[:4] == ["64", "512", "fwd+bwd", chunk_size])
        for chunk_size in ("64", "32")
    )
    assert "±" in slow
    assert "*" not in slow
    assert fast.count("*") == 2  # time and throughput; memory and error tie


def test_terminal_table_fits_80_columns_and_marks_the_best_in_bold(make_run: MakeRun) -> None:
    text = shown([make_run()], terminal=True)
    assert "\x1b[1m" in text
    plain = "".join(part.partition("m")[2] if index else part for index, part in enumerate(text.split("\x1b[")))
    assert max(map(len, plain.splitlines())) <= 80
    assert "…" not in plain


def test_markdown_names_the_machine_and_sets_the_best_in_bold(make_run: MakeRun) -> None:
    text = render.markdown([make_run()])
    assert "Some CPU 9000, torch 2.13.0, triton 3.7.1, mdnbench 0.1.0 (0123456, modified)" in text
    assert "Every row: on cpu, float32, gates mild, batch 1, heads 2, eager calls." in text
    assert text.count("\n## ") == 6
    assert "| **" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 32 |", "| 64 |"))]
    assert len(rows) == 120
    assert {line.count("|") for line in rows} == {9}


def test_value_dimensions_are_shown_where_they_differ(make_run: MakeRun) -> None:
    run = make_run(head_dims=((128, 256), (64, 64)), providers=("mdn-torch",))
    (block,) = tables.blocks(tables.to_rows([run]))
    assert block.header[0] == "K/V"
    assert {row[0].text for row in block.rows} == {"128/256", "64/64"}


def test_several_runs_are_told_apart(make_run: MakeRun) -> None:
    runs = [make_run("before", providers=("mdn-torch",)), make_run("after", providers=("mdn-torch",))]
    (block,) = tables.blocks(tables.to_rows(runs))
    assert "run" in block.header
    text = render.markdown(runs)
    assert "before: Some CPU 9000" in text
    assert "after: Some CPU 9000" in text


def test_frame_has_a_row_a_record_and_leaves_absent_values_empty(make_run: MakeRun) -> None:
    run = make_run()
    frame = tables.to_frame([run])
    assert len(frame) == len(run.records)
    assert "samples_ms" not in frame
    absent = frame[frame.status == "unsupported"]
    assert absent.latency_ms.isna().all()
    assert absent.chunk_size.isna().all()
    header, *lines = frame.to_csv(index=False).splitlines()
    assert header.startswith("run,operator,provider,seq_len,head_dim_k")
    assert "nan" not in " ".join(lines).lower()
    assert lines[0].startswith(
        "smoke,mdn,mdn-torch,128,32,32,1,2,2,32,float32,cpu,mild,forward,eager,warm,ok,,"
    )  # whole numbers stay whole


def test_what_providers_note_stands_below_the_tables_once(make_run: MakeRun) -> None:
    run = make_run(providers=("gdn-torch", "mdn-torch"))
    note = ("a refusal was lifted (https://example.org/issues/1)",)
    records = [replace(r, notes=note) if r.point.provider == "gdn-torch" else r for r in run.records]
    noted = replace(run, records=records)
    line = "Note on gdn-torch: a refusal was lifted (https://example.org/issues/1)."
    assert render.markdown([noted]).splitlines().count(line) == 1
    console = Console(file=io.StringIO(), width=200)
    render.show(console, [noted])
    assert console.file.getvalue().count(line) == 1
    assert "Note on" not in render.markdown([run])
    frame = tables.to_frame([noted])
    assert set(frame[frame.provider == "gdn-torch"].notes) == set(note)
    assert frame[frame.provider == "mdn-torch"].notes.isna().all()


def test_a_run_is_read_back_from_its_folder(make_run: MakeRun, tmp_path) -> None:
    run = make_run(seq_lens=(128,))
    folder = tmp_path / "first"
    folder.mkdir()
    for record in run.records:
        append_record(folder, record)
    assert load_run(folder) == Run("first", run.records, {})
    (folder / "environment.json").write_text(json.dumps(run.environment))
    assert load_run(folder / "results.jsonl") == Run("first", run.records, run.environment)
    assert load_runs([folder, folder / "results.jsonl"]) == [load_run(folder)]  # the same run twice is one run
    (folder / "environment.json").write_text("[]")
    with pytest.raises(ValueError, match=r"environment\.json is no JSON object: remove it"):
        load_run(folder)
    with pytest.raises(ValueError, match=r"has no results\.jsonl: give a run folder"):
        load_run(tmp_path)


def test_description_leaves_out_what_is_unknown() -> None:
    assert describe({}) == ""
    gpu = {"device": "cuda", "device_name": "NVIDIA H200", "gpu": {"driver": "580.12"}, "torch": "2.11.0"}
    assert describe(gpu) == "NVIDIA H200, driver 580.12, torch 2.11.0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (style.count(512), "512"),
        (style.count(1024), "1k"),
        (style.count(131072), "128k"),
        (style.count(1500), "1500"),
        (style.rate(987.4), "987"),
        (style.rate(99_960), "100k"),
        (style.rate(12_345), "12.3k"),
        (style.rate(999_600), "1.00M"),
        (style.mebibytes(1_048_576), "1.00"),
        (style.time_ms(1.23456, 1.2236, 1.2456, 31), "1.23 ± 0.01"),
        (style.time_ms(1234.5, 1200.0, 1260.0, 31), "1234 ± 30"),
        (style.time_ms(0.5, None, None, 3), "0.5 (n=3)"),
        (style.time_ms(1234.5, None, None, 5), "1234 (n=5)"),
        (style.error(2.14e-7), "2.1e-7"),
        (style.error(0.0), "0"),
    ],
)
def test_numbers_read_short(text: str, expected: str) -> None:
    assert text == expected


def test_times_of_a_throttled_gpu_are_marked_and_noted(make_run: MakeRun) -> None:
    run = make_run(providers=("mdn-torch", "gdn-torch"), chunk_sizes=(64,), seq_lens=(128,), modes=("forward",))
    held = ((GpuReading("during", 1200, slowed_by=("power cap",)), GpuReading("after", 1250)),)
    steady = ((GpuReading("during", 1980), GpuReading("after", 1980)),)
    records = [replace(r, gpu=held if i == 0 else steady) for i, r in enumerate(run.records)]
    text = render.markdown([replace(run, records=records)])
    (marked,) = [line for line in text.splitlines() if line.startswith("|") and " ! |" in line]
    assert marked.count("!") == 1
    assert "! marks times taken while the GPU was held back: see the notes." in text
    assert "- Throttled: 1 of 4 rows, at worst mdn-torch forward eager" in text
    assert (
        "- SM clocks differ by more than 3% in 1 of 2 comparisons, at worst by 65.0% within forward eager B1 T128"
        in text
    )
    assert "Notes on the measurements" not in render.markdown([run])


def test_rates_and_host_overhead_are_shown_where_there_are_any(make_run: MakeRun) -> None:
    run = make_run(providers=("mdn-torch",), chunk_sizes=(64,), regimes=("eager", "graph"), device="cuda")
    peaks = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": {"float32": 1e13}}
    counted = [replace(r, flops=10**9, bytes=10**6) for r in run.records]
    (plain,) = tables.blocks(tables.to_rows([make_run(providers=("mdn-torch",))]))
    (full,) = tables.blocks(
        tables.to_rows([replace(run, records=counted, environment=run.environment | {"peaks": peaks})])
    )
    assert plain.header[-4:] == ["time ms", "tokens/s", "MiB", "error"]
    assert full.header[-7:] == ["time ms", "host ms", "tokens/s", "TFLOP/s", "% roof", "MiB", "error"]
    host = full.header.index("host ms")
    regime = full.header.index("regime")
    assert all((row[host].text == "-") == (row[regime].text == "graph") for row in full.rows)


def test_latex_has_a_table_an_operator_and_escapes_text(make_run: MakeRun) -> None:
    run = make_run(providers=("mdn-torch", "attention-math"), seq_lens=(128, 256))
    text = latex.tables_of([replace(run, environment=run.environment | {"device_name": "A_B & C 100%"})])
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    assert r"A\_B \& C 100\%" in text
    assert r"\caption{Momentum DeltaNet (mdn-torch). Every row: on cpu" in text
    assert r"$\pm$" in text
    assert r"\textbf{" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = [line.split("{")[-1].rstrip("}") for line in text.splitlines() if line.startswith(r"\begin{tabular}")]
    assert {len(line.split(" & ")) for line in body} == {len(layout) for layout in columns}
    assert len(body) == 2 + 2 * 2 * 2 * 2 + 2 * 2 * 2  # headers; lengths, head dims, modes and chunk sizes
