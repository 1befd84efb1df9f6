"""Plots: panels, legends and what is kept apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mdnbench.bench.results import GpuReading
from mdnbench.reports import plots, roofline, style
from mdnbench.reports.plots import FIGURES, MOST_TICKS, draw, log_scale, write_plots
from mdnbench.reports.runs import Run

MakeRun = Callable[..., Run]


def panels(figure: Figure) -> dict[str, object]:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def test_files_are_written_with_titles_units_and_versions(make_run: MakeRun, tmp_path: Path) -> None:
    written = write_plots([make_run()], tmp_path)
    assert [path.name for path in written] == ["throughput.png", "throughput.svg", "memory.png", "memory.svg"]
    for path in written:
        assert path.stat().st_size > 20_000
    svg = (tmp_path / "throughput.svg").read_text()
    for text in (
        "tokens/s",
        "sequence length (tokens)",
        "K 32, V 32: forward + backward",
        "Some CPU 9000",
        ">mdn-torch<",
    ):
        assert text in svg
    again = tmp_path / "again"
    again.mkdir()
    write_plots([make_run()], again)
    assert (again / "throughput.svg").read_bytes() == (tmp_path / "throughput.svg").read_bytes()


def test_the_style_for_papers_has_serifs_and_leaves_titles_to_the_caption(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("screen", "paper"):
        (tmp_path / name).mkdir()
        write_plots([make_run()], tmp_path / name, name)
    screen, paper = ((tmp_path / name / "throughput.svg").read_text() for name in ("screen", "paper"))
    assert "Throughput against sequence length" in screen
    assert "Throughput against sequence length" not in paper
    assert "Some CPU 9000" not in paper
    assert "STIXGeneral" in paper or "serif" in paper
    assert ">mdn-torch<" in paper  # the legend stays
    with pytest.raises(ValueError, match="--style 'poster' is unknown: choose from screen, paper"):
        plots.check_style("poster")


def test_the_roofline_has_a_panel_a_mode_and_the_measured_ceilings(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(providers=("mdn-torch", "gdn-torch"), chunk_sizes=(64,))
    assert roofline.draw([run]) is None  # nothing was counted
    counted = [replace(r, flops=10**7 * r.point.workload.seq_len, bytes=10**6) for r in run.records]
    assert roofline.draw([replace(run, records=counted)]) is None  # no ceilings
    peaks = {"copy_bytes_per_s": 2e10, "matmul_flops_per_s": {"float32": 1e12}}
    run = replace(run, records=counted, environment=run.environment | {"peaks": peaks})
    figure = roofline.draw([run])
    found = panels(figure)
    assert set(found) == {"forward, float32", "forward + backward, float32"}
    *points, ceiling = found["forward, float32"].lines
    assert len(points) == 2 * 3 * 2  # providers, lengths, head dims
    x, y = ceiling.get_data()
    assert (x[1], y[1]) == (50, 1.0)  # the ridge: 1 TFLOP/s at 50 FLOP a byte
    assert y[2] == 1.0
    assert y[0] == pytest.approx(x[0] * 0.02)
    assert legend(figure) == ["mdn-torch", "gdn-torch"]
    ticks = [text.get_text() for text in found["forward, float32"].get_yticklabels()]
    assert all(float(text) > 0 for text in ticks)
    assert "1 TFLOP/s, 20.0GB/s copied" in [text.get_text() for text in found["forward, float32"].texts]
    assert "Some CPU 9000" in texts(figure)
    names = [path.name for path in write_plots([run], tmp_path)]
    assert names[-2:] == ["roofline.png", "roofline.svg"]


def test_labels_of_near_ceilings_do_not_overlap(make_run: MakeRun) -> None:
    def with_peaks(name: str, flops_per_s: float, copied: float = 2e10) -> Run:
        run = make_run(name, providers=("mdn-torch",), chunk_sizes=(64,), modes=("forward",))
        counted = [replace(r, flops=10**7 * r.point.workload.seq_len, bytes=10**6) for r in run.records]
        peaks = {"copy_bytes_per_s": copied, "matmul_flops_per_s": {"float32": flops_per_s}}
        return replace(run, records=counted, environment=run.environment | {"peaks": peaks, "torch": name})

    first, second, third = with_peaks("a", 1e12), with_peaks("b", 1.01e12), with_peaks("c", 1e11, copied=1e10)
    figure = roofline.draw([first, second, third, with_peaks("d", 1.01e12)])
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.texts]
    assert labels == [
        "b, d: 1.01 TFLOP/s, 20.0GB/s copied\na: 1 TFLOP/s, 20.0GB/s copied",
        "c: 0.1 TFLOP/s, 10.0GB/s copied",
    ]
    assert {line.get_xdata()[2] for line in axes.lines[-3:]} == {axes.texts[0].xy[0]}  # all end where labels do
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent() for text in (*axes.texts, axes.title)]
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])
    footer = figure.texts[-1].get_window_extent()
    assert footer.x1 <= figure.bbox.width
    assert not footer.overlaps(axes.get_tightbbox())


def test_points_of_a_throttled_gpu_are_open(make_run: MakeRun) -> None:
    run = make_run(providers=("mdn-torch",), chunk_sizes=(64,), head_dims=((64, 64),), modes=("forward",))
    held = ((GpuReading("during", 1200, slowed_by=("power cap",)),),)
    records = [replace(run.records[0], gpu=held), *run.records[1:]]
    figure = draw([replace(run, records=records)], FIGURES["throughput"])
    (axes,) = figure.axes
    line, marked = axes.lines
    assert len(line.get_xdata()) == 3
    assert list(marked.get_xdata()) == [128]
    assert marked.get_markerfacecolor() == "white"
    assert "Open markers: the GPU was held back (power, heat)." in texts(figure).replace("\n", " ")
    assert "Open markers" not in texts(draw([run], FIGURES["throughput"]))


def test_png_is_at_least_150_dpi() -> None:
    assert plots.PNG_DPI >= 150


def test_a_panel_a_head_dim_and_mode_with_a_line_a_provider_and_chunk_size(make_run: MakeRun) -> None:
    figure = draw([make_run()], FIGURES["throughput"])
    found = panels(figure)
    assert set(found) == {f"K {k}, V {k}: {mode}" for k in (32, 64) for mode in ("forward", "forward + backward")}
    lines = found["K 32, V 32: forward"].lines
    assert len(lines) == 4 * 2 + 2  # four chunked operators at two chunk sizes, two attention backends
    assert len({line.get_color() for line in lines}) == 5
    assert len({line.get_marker() for line in lines}) == 6
    assert len({line.get_linestyle() for line in lines}) == 2
    assert [text for text in legend(figure) if text in ("Chunk size", "32", "64")] == ["Chunk size", "32", "64"]
    assert "24 points without a time are not drawn" in texts(figure)
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in found.values())


def test_colours_and_markers_are_distinct_and_fixed() -> None:
    pairs = [("other", "other-a"), ("mdn", "mdn-torch"), ("mdn", "mdn-triton"), ("gdn", "gdn-torch")]
    looks = style.looks(pairs)
    assert looks["mdn-torch"].colour == looks["mdn-triton"].colour == style.OPERATOR_COLOURS["mdn"]
    assert len({look.marker for look in looks.values()}) == 4
    assert len({look.colour for look in looks.values()}) == 3


def test_cpu_and_gpu_and_eager_and_graph_never_share_a_panel(make_run: MakeRun) -> None:
    cpu = make_run(modes=("forward",), head_dims=((64, 64),))
    gpu = make_run("h200", modes=("forward",), head_dims=((64, 64),), device="cuda", regimes=("eager", "graph"))
    figure = draw([cpu, gpu], FIGURES["throughput"])
    assert sorted(panels(figure)) == [
        "K 64, V 64: forward, cpu, eager calls",
        "K 64, V 64: forward, cuda, CUDA graph",
        "K 64, V 64: forward, cuda, eager calls",
    ]
    assert "smoke: Some CPU 9000" in texts(figure)
    assert "h200: NVIDIA H200, driver 580.12" in texts(figure)
    assert legend(figure)[-3:] == ["Run", "smoke", "h200"]


def test_two_runs_share_a_panel_and_differ_by_line_style(make_run: MakeRun) -> None:
    runs = [make_run(name, providers=("mdn-torch", "gdn-torch")) for name in ("before", "after")]
    figure = draw(runs, FIGURES["memory"])
    lines = panels(figure)["K 32, V 32: forward"].lines
    assert len(lines) == 4
    assert len({line.get_linestyle() for line in lines}) == 2
    assert "Each provider at its fastest chunk size for that length." in texts(figure)


def test_crowded_panels_show_the_fastest_chunk_size_and_say_so(make_run: MakeRun) -> None:
    run = make_run(chunk_sizes=(16, 32, 64, 128))
    figure = draw([run], FIGURES["throughput"])
    axes = panels(figure)["K 64, V 64: forward"]
    assert len(axes.lines) == 6
    assert "Chunk size" not in legend(figure)
    assert "Each provider at its fastest chunk size for that length." in texts(figure)
    (line,) = [line for line in axes.lines if line.get_color() == style.OPERATOR_COLOURS["mdn"]]
    best = max(
        record.point.workload.tokens / sorted(record.samples_ms)[15] * 1e3
        for record in run.records
        if (record.point.provider, record.point.mode) == ("mdn-torch", "forward")
        and (record.point.workload.seq_len, record.point.workload.head_dim_k) == (512, 64)
    )
    assert line.get_ydata()[-1] == pytest.approx(best)


def test_nothing_measured_gives_no_figure(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(providers=("attention-flash",))
    assert write_plots([run], tmp_path) == []
    no_memory = [replace(record, peak_memory_bytes=None) for record in make_run().records]
    assert [path.name for path in write_plots([Run("r", no_memory)], tmp_path)] == ["throughput.png", "throughput.svg"]


def test_a_single_point_can_be_drawn(make_run: MakeRun) -> None:
    run = make_run(
        seq_lens=(512,), head_dims=((64, 64),), modes=("forward",), providers=("mdn-torch",), chunk_sizes=(64,)
    )
    for quantity in FIGURES.values():
        (axes,) = panels(draw([run], quantity)).values()
        assert len(axes.get_yticks()) >= 2
        assert [text.get_text() for text in axes.get_xticklabels()] == ["512"]


def test_many_lengths_get_few_ticks(make_run: MakeRun) -> None:
    run = make_run(seq_lens=tuple(512 * 2**i for i in range(9)), head_dims=((64, 64),), modes=("forward",))
    (axes,) = panels(draw([run], FIGURES["throughput"])).values()
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["512", "2k", "8k", "32k", "128k"]


@pytest.mark.parametrize("base", [2, 10])
@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (3e6, 3.1e6), (1.9e5, 2.1e6), (700.0, 2e9), (2.0**30, 2.0**37)])
def test_log_axes_hold_the_data_and_a_few_round_ticks(low: float, high: float, base: int) -> None:
    bottom, top, ticks = log_scale(low, high, base)
    assert bottom < low <= high < top
    assert 2 <= len(ticks) <= MOST_TICKS
    assert ticks == sorted(set(ticks))
    assert bottom <= ticks[0] < ticks[-1] <= top
