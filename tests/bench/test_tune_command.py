"""The command `mdnbench tune`: shapes, bad input, what it says, what it leaves in the store."""

import logging
import os
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mdnbench.baselines.workload import Workload
from mdnbench.bench import cli_tune, tune, tune_views
from mdnbench.bench.cli import main
from mdnbench.bench.tune_interface import Progress
from mdnbench.bench.tune_log import LOG_FILE, Choice
from mdnbench.kernels import store
from mdnbench.kernels.space import table_config
from mdnbench.kernels.versions import source_hash

H200 = store.Gpu("NVIDIA H200", "9.0", 232448, 132)
REAL = Workload(4096, 128, 128, batch=4, heads=16, dtype="bfloat16", device="cuda")

pytestmark = pytest.mark.usefixtures("nothing_stored")


def test_shapes_are_those_of_presets_each_once() -> None:
    shapes = cli_tune.shapes_of(None, {})
    assert len(shapes) == 14
    assert {shape.device for shape in shapes} == {"cuda"}
    given = {"batch": "4", "heads": "16", "head_dim": "128", "v_head_dim": "128", "seq_len": "4k,4000"}
    (one,) = cli_tune.shapes_of(None, given)  # 4000 and 4096 tokens have one entry
    assert one == REAL
    assert [shape.dtype for shape in cli_tune.shapes_of("ci", {"dtype": "float16"})] == ["float16"] * 2


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("20", 20)])
def test_durations(text: str, seconds: float) -> None:
    assert cli_tune.parse_duration("--budget", text) == seconds


def test_show_needs_no_gpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--show", "--shapes", "paper-400m"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 3
    assert lines[1].split()[:2] == ["NVIDIA", "H200"]
    assert "block_v=" in lines[1]
    config = asdict(table_config("forward", tune.shape_of(REAL, H200)))
    entry = store.Entry(tune.key_of(REAL, "forward"), config, store.TUNED, store.installed_versions("9.0"), 0.1234, ())
    store.write(store.user_folder(), H200, [entry])
    sizes = ["--batch", "4", "--heads", "16", "--head-dim", "128", "--v-head-dim", "128", "--seq-len", "4k"]
    assert main(["tune", "--show", *sizes]) == 0
    shown = capsys.readouterr().out
    assert "0.1234" in shown
    assert "user, tuned" in shown


def test_export_copies_what_was_tuned_and_fills_up_from_the_table(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(store, "SHIPPED_FOLDER", tmp_path / "none")
    workload = cli_tune.shapes_of("paper-400m", {})[0]
    key = tune.key_of(workload, "forward")
    config = asdict(table_config("forward", tune.shape_of(workload, H200)))
    entry = store.Entry(key, config, store.TUNED, store.Versions(source_hash(), "t", "p", "v"), 0.5, ())
    of_other_kernels = replace(entry, versions=store.Versions("other", "t", "p", "v"))
    store.write(store.user_folder(), H200, [entry, of_other_kernels])
    assert main(["tune", "--export", "--out", str(tmp_path / "out"), "--shapes", "paper-400m"]) == 0
    assert "1 tuned entries" in capsys.readouterr().out
    gpu, entries = store.read(store.file_of(tmp_path / "out", H200.name))
    assert gpu == H200
    assert sorted(it.source for it in entries) == ["hand-chosen"] * 5 + ["tuned"]
    assert next(it for it in entries if it.key == key) == entry


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no GPU here that PyTorch sees, and candidates are timed on one: run mdnbench tune on the"),
        (["--device", "cpu"], "--device 'cpu': candidates are timed on a GPU; use cuda or cuda:N"),
        (["--operator", "gdn"], "--operator 'gdn' has no kernels to tune: choose from mdn"),
        (["--shapes", "paper"], "--shapes 'paper' is unknown: did you mean paper-400m?"),
        (["--budget", "soon"], "--budget 'soon' is no time above 0; write for example --budget 10m"),
        *(
            (
                [*mode, "--heads", "4", "--value-heads", "32"],
                "--value-heads 32 for 4 heads: stored configurations serve calls with as many value heads as heads; "
                "tune with --heads 32",
            )
            for mode in ([], ["--show"], ["--verify"], ["--export"])
        ),
        (["--jobs", "0"], "--jobs '0' is not a whole number of at least 1"),
        (["--show", "--export"], "--show and --export: give one of them"),
        (["--verify", "--resume"], "--verify and --resume: give one of them"),
        *(
            ([mode, option, value], f"{mode} and {option}: give one of them")
            for mode, option, value in (
                ("--show", "--budget", "5m"),
                ("--show", "--jobs", "2"),
                ("--show", "--out", "here"),
                ("--verify", "--budget", "5m"),
                ("--verify", "--out", "here"),
                ("--export", "--jobs", "2"),
            )
        ),
        (["--show", "--chunk-size", "48"], "--chunk-size 48 is not offered: use one of 16, 32, 64, 128"),
    ],
)
def test_bad_input_is_one_line(arguments, message: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mdnbench: {message}")
    assert error.count("\n") == 1


class Found:
    """In place of `tune.tune`: a choice a direction, or what is raised."""

    def __init__(self, fault: BaseException | None = None) -> None:
        self.fault, self.settings = fault, []

    def __call__(self, workload, gpu, log, settings, watch):
        self.settings.append(settings)
        if self.fault is not None:
            raise self.fault
        before = log.incumbents(workload.label(), {it: {"warps": 4} for it in tune.DIRECTIONS})
        choices = []
        for direction, ratio in zip(tune.DIRECTIONS, (0.9, 1.0)):
            name, candidate = f"{direction} all {workload.label()}", {"warps": 8} if ratio < 1 else before[direction]
            trial = log.trial(name, candidate)
            trial.stage, trial.status, trial.reason = "done", "ok", "chosen"
            log.put(trial)
            choices.append(Choice(name, candidate, ratio, 1.0, ratio, ratio - 0.01, ratio + 0.01, 0.005))
            log.choose(choices[-1])
        return choices


@pytest.fixture
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(cli_tune, "_gpu", lambda device: "cuda")
    monkeypatch.setattr(tune, "known_gpus", lambda device: [H200])


def test_the_command_says_what_was_found_and_where_it_is(pretended_gpu, capsys, monkeypatch) -> None:
    found = Found()
    monkeypatch.setattr(tune, "tune", found)
    assert main(["tune", "--shapes", "paper-400m", "--budget", "6m", "--jobs", "3"]) == 0
    output = capsys.readouterr().out
    assert "warps=8 (was 4)" in output
    assert "forward all" in output
    assert "0.900 [0.890, 0.910]" in output
    assert output.splitlines()[-1] == (
        f"3 of 6 changed, 3 keep their configuration; saved in {store.user_folder()}/NVIDIA-H200.json"
    )
    assert [settings.jobs for settings in found.settings] == [3] * 3
    assert found.settings[0].seconds == pytest.approx(120, abs=1)  # of three shapes
    (folder,) = Path("runs").iterdir()
    assert folder.name.endswith("-tune")
    assert main(["tune", "--shapes", "paper-400m", "--resume"]) == 0  # the newest one
    assert len(list(Path("runs").iterdir())) == 1


def test_ctrl_c_says_how_to_go_on(pretended_gpu, capsys, monkeypatch) -> None:
    monkeypatch.setattr(tune, "tune", Found(KeyboardInterrupt()))
    assert main(["tune", "--out", "here"]) == 130
    assert "nothing found is lost, go on with: mdnbench tune --resume --out here" in capsys.readouterr().err
    assert Path("here", LOG_FILE).exists()


def test_what_does_not_fit_or_stops_a_verification_is_one_line(pretended_gpu, capsys) -> None:
    assert main(["tune", "--verify", "--head-dim", "300", "--seq-len", "4k"]) == 1
    error = capsys.readouterr().err
    assert "K300" in error
    assert "q has head dimension 300: the GPU kernels take up to 256" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped: what is above was verified"),
        (RuntimeError("the process for candidates did not start"), 1, "the process for candidates did not start; see "),
    ],
)
def test_a_verification_ends_without_a_traceback(
    pretended_gpu, capsys, monkeypatch, fault: BaseException, code: int, message: str
) -> None:
    monkeypatch.setattr(tune, "verify", Found(fault))
    assert main(["tune", "--verify", "--shapes", "ci"]) == code
    assert f"mdnbench: {message}" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_to_ends_a_search_before_it_begins(pretended_gpu, capsys, monkeypatch) -> None:
    store.user_folder().parent.mkdir(parents=True)
    store.user_folder().write_text("a file")
    found = Found()
    monkeypatch.setattr(tune, "tune", found)
    assert main(["tune"]) == 2
    error = capsys.readouterr().err
    assert "cannot be written to (" in error
    assert error.count("\n") == 1
    assert found.settings == []
    assert not Path("runs").exists()


def test_a_damaged_file_of_another_gpu_is_left_out(capsys, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    store.user_folder().mkdir(parents=True)
    damaged = store.user_folder() / "NVIDIA-A100.json"
    damaged.write_text("{")
    with caplog.at_level(logging.WARNING, "mdnbench"):
        assert main(["tune", "--show", "--shapes", "paper-400m"]) == 0
        assert main(["tune", "--export", "--shapes", "paper-400m", "--out", "out"]) == 0
    assert "NVIDIA H200" in capsys.readouterr().out
    assert [f"{damaged} is left out (it is damaged" in record.getMessage() for record in caplog.records] == [True]


def test_a_direction_without_a_choice_says_why(pretended_gpu, capsys, monkeypatch) -> None:
    def search(workload, gpu, log, settings, watch):
        log.trial(f"forward scan {workload.label()}", {"scan_warps": 4})  # which the time did not suffice for
        return []

    monkeypatch.setattr(tune, "tune", search)
    assert main(["tune", "--shapes", "ci", "--dtype", "float16", "--seq-len", "512", "--out", "here"]) == 1
    forward, backward = capsys.readouterr().err.splitlines()
    assert forward.startswith("mdnbench: forward B")
    assert "the time was too short, and nothing is stored for it; go on with: mdnbench tune --resume" in forward
    assert "nothing was right; the reasons are in here/tune.jsonl" in backward


def test_a_search_of_other_versions_is_not_gone_on_with(pretended_gpu, capsys, monkeypatch) -> None:
    monkeypatch.setattr(tune, "tune", Found())
    assert main(["tune", "--resume"]) == 2
    assert "--resume: there is no search in runs" in capsys.readouterr().err
    assert main(["tune", "--out", "here", "--shapes", "ci"]) == 0
    other = store.installed_versions("9.0")._replace(triton="3.0.0")
    monkeypatch.setattr(store, "installed_versions", lambda capability: other)
    assert main(["tune", "--out", "here", "--shapes", "ci", "--resume"]) == 2
    assert "start another one" in capsys.readouterr().err


def test_one_gpu_of_several_is_the_only_one_of_the_processes(monkeypatch) -> None:
    for visible, device, expected in ((None, "cuda:2", "2"), ("4,5", "cuda:1", "5"), ("4,5", "cuda", "4,5")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        cli_tune._select(device)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_the_notice_goes_to_the_log_once(caplog) -> None:
    with caplog.at_level(logging.WARNING, "mdnbench"):
        store._notice("a")
        store._notice("a")
    assert len(caplog.records) == 1


def test_progress_on_a_terminal_and_in_a_log(capsys, monkeypatch) -> None:
    progress = Progress(
        3, "short trials", Counter(ok=1, pruned=2), {f"forward scan {REAL.label()}": "0.25 ms"}, 1, 3, 40.0
    )
    console = Console(width=100, color_system=None)
    console.print(tune_views.lines_of("1/2 shape", progress))
    shown = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in shown] == [
        "1/2 shape: short trials 1/3, 40 s left", "  1 ok, 2 pruned", "  best of forward scan: 0.25 ms",
    ]  # fmt: skip
    monkeypatch.setattr(tune_views, "SECONDS_BETWEEN_LINES", 0.0)
    with tune_views.TuneDisplay() as display:
        display.heading = "shape"
        display(progress)
    line = "shape: short trials 1/3, 40 s left; 1 ok, 2 pruned; best of forward scan: 0.25 ms\n"
    assert capsys.readouterr().err == line
