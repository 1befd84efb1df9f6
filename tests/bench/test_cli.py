"""The command line, end to end: bad input, dry runs, a small sweep, its resumption, and reports."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mdnbench.baselines.gdn import GdnTorch
from mdnbench.bench.cli import main
from mdnbench.bench.listing import capabilities
from mdnbench.bench.results import read_records

TINY = ("--preset", "ci", "--device", "cpu", "--seq-len", "32,64", "--time-limit", "0.02")
REPORTS = ("table.md", "table.csv", "report.html", "throughput.png", "throughput.svg", "memory.png", "memory.svg")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _no_stored_peaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Peaks that the user of this machine has stored would add figures and columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of two providers, one of which cannot run here."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["sweep", *TINY, "--provider", "gdn-torch,attention-sdpa-cudnn", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("sweep --seq-len 5,abc", "--seq-len '5,abc': 'abc' is not a whole number; write for example --seq-len 512,2k"),
        ("sweep --chunk-size 0", "--chunk-size '0': '0' is below 1; write for example --chunk-size 32,64"),
        ("sweep --head-dim 32,64 --v-head-dim 1,2,3", "--v-head-dim 1,2,3: 3 values for the 2 of --head-dim"),
        ("sweep --batch 0", "--batch '0' is not a whole number of at least 1"),
        ("sweep --heads 2 --value-heads 3", "--value-heads 3 is not a multiple of --heads 2: use 2, 4, 6, ..."),
        ("sweep --seed -1", "--seed '-1' is not a whole number of at least 0"),
        ("sweep --time-limit 0", "--time-limit '0' is not a number of seconds above 0"),
        ("sweep --min-time 2 --time-limit 1", "--min-time 2 is above --time-limit 1: raise the limit"),
        ("sweep --precision x", "--precision 'x' is not between 0% and 100%"),
        ("sweep --regime graph-warm --device cpu", "--regime graph-warm needs a GPU, and the device is cpu"),
        ("sweep --preset fast", "--preset 'fast' is unknown: choose from ci"),
        ("sweep --provider mdn-tortch", "--provider 'mdn-tortch' is unknown: did you mean mdn-torch?"),
        ("sweep --provider ,", "--provider ',' names nothing"),
        ("sweep --dtype fp8", "--dtype 'fp8' is unknown: choose from float32, float16, bfloat16"),
        ("sweep --mode fwd", "--mode 'fwd' is unknown"),
        ("sweep --regime graph --device cpu", "--regime graph needs a GPU, and the device is cpu: use --regime eager"),
        ("sweep --gates beta=0,beta=1", "--gates 'beta=0,beta=1': a sweep has one gate profile"),
        ("sweep --device tpu", "--device 'tpu' is unknown: choose cpu, cuda, cuda:N or auto"),
        ("sweep --device cuda:99", "--device 'cuda:99': PyTorch sees"),
        ("sweep --name a/b", "--name 'a/b': use letters"),
        ("sweep --resume", "--resume needs the folder of the run: add --out FOLDER"),
        ("sweep --resume --out nowhere", "--resume: nowhere holds no sweep"),
        (f"sweep --resume --out {__file__}", "holds no sweep; give the folder of a run by --out"),
        ("sweep --seq-lens 5", "No such option: --seq-lens"),
        ("sweep stray", "stray"),
        ("report", "Missing argument 'RUN...': mdnbench report --help"),
        ("report {run} --provider mdn", "--provider 'mdn' is unknown: did you mean gdn? choose from attention, "),
        ("report {run} --mode fwd", "--mode 'fwd' is unknown"),
        ("report {run} --gates layer", "--gates 'layer' is unknown: choose from mild"),
        ("report {run} --seq-len x", "--seq-len 'x': 'x' is not a whole number"),
        (
            "report {run} --seq-len 32,96 --mode backward",
            "--seq-len 32,96 --mode backward: no row has all of this; the 4 rows have --seq-len 32,64, --mode forward_",
        ),
        ("report nowhere", "RUN 'nowhere' has no results.jsonl: give a run folder"),
        ("sweep --precision 0", "--precision '0' is not above 0%: write for example --precision 3%"),
        ("check --gates gamma", "--gates 'gamma' is unknown: choose from all, mild"),
        ("check --profiles nope", "--profiles 'nope' is unknown: choose from all, mild"),
        ("check --profiles all,nope", "--profiles 'nope' is unknown"),
        ("check --provider attention --profiles eta=2", "--profiles 'eta=2': no chosen provider reads these gates"),
        ("check --dtype float32,float16", "--dtype 'float32,float16': give one dtype here, such as --dtype float32;"),
        ("check --provider attention --gates eta=2", "no chosen provider reads these gates"),
        ("list --provider nothing-like-it", "--provider 'nothing-like-it' is unknown: mdnbench list shows all names"),
        ("frobnicate", "No such command 'frobnicate'"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path
) -> None:
    capsys.readouterr()
    assert main(arguments.format(run=run).split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mdnbench: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert list(tmp_path.iterdir()) == []  # nothing was made


@pytest.mark.parametrize(
    "code",
    [
        "main([])",
        "main(['sweep', '--help'])",
        "main(['report', sys.argv[1], '--out', 'again'])",
    ],
)
def test_help_and_report_load_no_torch(code: str, run: Path) -> None:
    script = f"import sys; from mdnbench.bench.cli import main; assert {code} == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(run)], check=True, capture_output=True)


def test_dry_run_says_which_chunk_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", "--dry-run", "--device", "cpu", "--provider", "mdn-triton,mdn-torch,attention-sdpa-math"]
    assert main([*arguments, "--seq-len", "64", "--head-dim", "32", "--chunk-size", "48,64", "--mode", "forward"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"mdnbench: warning: {name} takes chunk sizes 16, 32, 64, 128 only, not 48: 1 points get no time"
        for name in ("mdn-triton", "mdn-torch")
    ]


def test_dry_run_prints_every_point_and_runs_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [
        "sweep",
        "--device",
        "cpu",
        "--provider",
        "mdn-torch",
        "--seq-len",
        "64:256:x2",
        "--chunk-size",
        "16,32",
    ]
    arguments += ["--head-dim", "32", "--v-head-dim", "64", "--mode", "forward", "--gates", "layer", "--dry-run"]
    assert main(arguments) == 0
    *points, last = capsys.readouterr().out.splitlines()
    assert points == [
        f"mdn-torch forward eager B1 T{t} H2 K32 V64 C{c} float32 cpu layer" for t in (64, 128, 256) for c in (16, 32)
    ]
    assert last.startswith("6 points, about ")
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["seq_len"], row["chunk_size"]) for row in rows] == [(t, c) for t in (64, 128, 256) for c in (16, 32)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU does")
def test_a_gpu_preset_is_planned_without_a_gpu_and_not_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["sweep", "--preset", "paper-400m", "--provider", "gdn-torch"]
    assert main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "gdn-torch forward graph B8 T512 H6 K128 V256 C64 bfloat16 cuda" in printed.out.splitlines()
    assert printed.err.startswith("mdnbench: warning: this is a plan for another machine: --device 'cuda': ")
    assert printed.err.count("\n") == 1
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("mdnbench: --device 'cuda': PyTorch sees no GPU here")
    assert list(tmp_path.iterdir()) == []


def test_gpus_are_numbered_as_nvml_numbers_them_unless_the_user_says_otherwise(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert main(["--version"]) == 0
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    assert main(["--version"]) == 0
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mdnbench {metadata.version('mdnbench')}\n"


def test_options_go_before_the_preset_and_v_follows_k(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "sweep --preset paper-400m --device cpu --dtype float32 --batch 2 --seed 7 --provider gdn-torch"
    assert main([*arguments.split(), "--head-dim", "64,128", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["head_dim_k"], row["head_dim_v"]) for row in rows} == {(64, 64), (128, 128)}
    assert {row["seq_len"] for row in rows} == {512, 2048, 4096}
    assert {(row["batch"], row["heads"], row["dtype"]) for row in rows} == {(2, 6, "float32")}
    assert main([*arguments.split(), "--v-head-dim", "64", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["head_dim_k"], row["head_dim_v"]) for row in rows} == {(128, 64)}


def test_a_sweep_leaves_rows_environment_tables_and_plots(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {"results.jsonl", "environment.json", "sweep.json", *REPORTS}
    records = read_records(run)
    statuses = {(record.point.provider, record.point.workload.seq_len): record.status for record in records}
    assert statuses == {
        **{("gdn-torch", seq_len): "ok" for seq_len in (32, 64)},
        **{("attention-sdpa-cudnn", seq_len): "unsupported" for seq_len in (32, 64)},
    }
    environment = json.loads((run / "environment.json").read_text())
    assert environment["device"] == "cpu"
    rows = list(csv.DictReader(io.StringIO((run / "table.csv").read_text())))
    assert len(rows) == 4
    assert [float(row["latency_ms"] or "nan") for row in rows] == [
        pytest.approx(record.latency_ms or float("nan"), nan_ok=True) for record in records
    ]
    markdown = (run / "table.md").read_text()
    assert environment["device_name"] in markdown
    assert "## Gated DeltaNet (gdn-torch)" in markdown
    for name in REPORTS[2:]:
        assert (run / name).stat().st_size > 5000


def test_a_finished_run_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "results.jsonl").read_bytes()
    assert main(["sweep", *TINY, "--out", str(run)]) == 2
    assert capsys.readouterr().err.endswith("holds results already: add --resume, or choose another folder\n")
    assert main(["sweep", *TINY, "--resume", "--out", str(run)]) == 2  # of all providers: a different sweep
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "was measured with providers gdn-torch, attention-sdpa-cudnn, this sweep has mdn-torch" in error
    assert (run / "results.jsonl").read_bytes() == before


def test_resuming_needs_the_folder_alone_and_measures_what_is_missing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    lines = (run / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])  # as a kill may leave it
    (folder / "sweep.json").write_text((run / "sweep.json").read_text())
    environment = json.loads((run / "environment.json").read_text()) | {"git_commit": "0123456789abcdef"}
    (folder / "environment.json").write_text(json.dumps(environment))
    assert main(["sweep", "--resume", "--out", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    warnings = [line for line in printed.err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert f"rows of two states of the code will share {folder}: commit 0123456" in warnings[0]
    assert json.loads((folder / "environment.json").read_text()) == environment  # that of the first rows stays
    rows = json.loads(printed.out)
    assert sorted(row["status"] for row in rows) == ["ok", "ok", "unsupported", "unsupported"]
    now = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    assert now[:2] == lines[:2]
    assert len(now) == 4
    (folder / "environment.json").write_text("{")
    assert main(["sweep", "--resume", "--out", str(folder)]) == 2
    assert capsys.readouterr().err.endswith("environment.json is damaged: remove it to go on without\n")


def test_ctrl_c_keeps_what_was_measured_and_says_how_to_resume(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from mdnbench.bench.cli import main; sys.exit(main())", "sweep"]
    command += ["--device", "cpu", "--provider", "gdn-torch,mamba2-torch", "--out", "stopped", "--time-limit", "0.05"]
    results = tmp_path / "stopped" / "results.jsonl"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )
    deadline = time.monotonic() + 60
    while not (results.exists() and results.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the worker as well
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = len(read_records(results))
    last = error.splitlines()[-1]
    assert last == f"mdnbench: stopped after {kept} of 48 points; go on with: mdnbench sweep --resume --out stopped"
    assert f"{kept} points: {kept} ok." in out
    assert all((tmp_path / "stopped" / name).exists() for name in REPORTS)


def test_reports_are_made_again_from_one_run_or_several(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    assert main(["report", str(run), "--out", str(again)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"Saved in {again}: {', '.join(REPORTS)}"
    assert "\x1b" not in printed
    assert (again / "table.csv").read_text() == (run / "table.csv").read_text()
    second = tmp_path / "second"
    second.mkdir()
    (second / "results.jsonl").write_bytes((run / "results.jsonl").read_bytes())
    assert main(["report", str(run), str(second), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in rows] == ["tiny"] * 4 + ["second"] * 4
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-report")
    assert sorted(path.name for path in folder.iterdir()) == sorted(REPORTS)
    # As runs/* gives them: the report between the runs is passed over.
    assert main(["report", str(run), str(folder), str(second), "--out", str(again), "--json"]) == 0
    printed = capsys.readouterr()
    assert [row["run"] for row in json.loads(printed.out)] == ["tiny"] * 4 + ["second"] * 4
    assert printed.err == f"mdnbench: warning: {folder} is passed over: it holds a report and no results\n"
    assert main(["report", str(folder)]) == 2
    assert "has no results.jsonl: give a run folder" in capsys.readouterr().err


def test_a_report_of_chosen_rows(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    arguments = ["report", str(run), "--provider", "gdn", "--seq-len", "1:49:16,64", "--head-dim", "16"]
    arguments += ["--v-head-dim", "32", "--mode", "forward_backward", "--regime", "eager", "--gates", "mild"]
    latex = tmp_path / "tables.tex"
    assert main([*arguments, "--latex", str(latex), "--out", "chosen"]) == 0
    printed = capsys.readouterr().out
    with open("chosen/table.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["provider"], row["seq_len"]) == ("gdn-torch", "64")
    for text in (printed, Path("chosen/table.md").read_text(), latex.read_text()):
        assert "attention" not in text
    assert "1 points: 1 ok" in printed
    assert '"provider":"attention' not in Path("chosen/report.html").read_text()
    assert main(arguments) == 0  # into a folder of its own
    assert len(list(Path("runs").iterdir())) == 1
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_report_refuses_a_folder_it_cannot_write_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--out", str(run / "table.md")]) == 2
    assert "table.md' cannot be written to (File exists): choose another folder" in capsys.readouterr().err


def test_list_says_what_runs_here_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "Momentum DeltaNet (mdn) on cpu" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["mdn-torch"])
    assert row.split()[1:] == ["float32", "float16", "bfloat16", "16", "32", "64", "128", "fwd", "bwd", "fwd+bwd"]
    assert "attention-sdpa-cudnn does not run here: runs on cuda only, not on cpu" in text
    assert main(["list", "--device", "cpu", "--provider", "attention", "--json"]) == 0
    rows = {row["provider"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["attention-sdpa-math"]["reason"] is None
    assert rows["attention-sdpa-math"]["chunk_sizes"] is None
    assert rows["attention-sdpa-cudnn"]["dtypes"] == []


def test_list_survives_a_provider_whose_own_check_raises() -> None:
    class Raising(GdnTorch):
        def supports(self, workload, mode="forward"):
            raise KeyError("boo")

    found = capabilities(Raising(), "cpu")
    assert found.reason == "its own check failed: KeyError: 'boo'"
    assert found.chunk_sizes == ()


def test_check_shows_the_error_at_each_profile(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", "--device", "cpu", "--provider", "mamba2-torch,attention-sdpa-cudnn"]
    assert main([*arguments, "--gates", "mild,reset=-inf"]) == 0
    text = capsys.readouterr().out
    mamba2 = text.split("attention\n")[0]
    cells = {line.split()[0]: line.split()[1] for line in mamba2.splitlines() if line.startswith("  ")}
    assert cells["gates"] == "mamba2-torch"
    assert float(cells["mild"]) < 1e-4
    assert cells["reset=-inf"] == "unsupported"
    assert "3 checks: 2 unsupported, 1 ok" in text
    assert main([*arguments, "--gates", "mild", "--json"]) == 0
    checked, unsupported = json.loads(capsys.readouterr().out)
    assert (checked["status"], checked["samples_ms"]) == ("ok", [])
    assert unsupported["status"] == "unsupported"


def test_doctor_reports_as_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    text = capsys.readouterr().out
    assert "Python" in text
    assert text.splitlines()[-1].startswith(f"errors: {code}" if code == 0 else "errors: ")
    assert main(["doctor", "--json"]) == code
    rows = json.loads(capsys.readouterr().out)
    assert code == any(row["level"] == "error" for row in rows)


def test_all_among_gate_profiles_is_all_of_them() -> None:
    from mdnbench.bench.options import check_points

    everything = check_points(["gdn-torch"], None, "auto", "cpu")
    assert len(everything) > 2
    assert check_points(["gdn-torch"], ["all,mild"], "float32", "cpu", option="--profiles") == everything
