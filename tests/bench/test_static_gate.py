"""The static gate: verdicts on figures, errors, and on changed kernels in a repository of its own."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mdnbench.bench import inspection, static_gate
from mdnbench.bench.code_figures import CLASSES
from mdnbench.bench.inspection import Inspection
from mdnbench.bench.static_gate import compare, run_static_gate

ROOT = Path(__file__).resolve().parents[2]


def make_launch(case: str, kernel: str, **changes) -> dict:
    return {
        "case": case,
        "kernel": kernel,
        "constants": {"BK": 128, "BV": 32, "C": 64, "K": 128},
        "num_warps": 4,
        "num_stages": 2,
        "max_registers": None,
        "registers": 200,
        "stack_bytes": 0,
        "shared_bytes": 100_000,
        "programs_per_multiprocessor": 2,
        "ptx": dict.fromkeys(CLASSES, 100) | {"local_memory": 0},
        "sass": dict.fromkeys(CLASSES, 100) | {"local_memory": 0},
        "code_bytes": 8192,
        "vector_loads": 4,
    } | changes


@pytest.fixture
def base() -> Inspection:
    return {
        "schema_version": 1,
        "target": "sm_90",
        "triton": "3.7.1",
        "ptxas": "12.8.93",
        "unsupported": {},
        "launches": [
            make_launch("h16d128", "prepare_fwd_kernel"),
            make_launch("h16d128", "scan_fwd_kernel"),
            make_launch("d64", "scan_fwd_kernel"),
        ],
    }


@pytest.fixture
def gate(base: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """gate(changes) -> exit code and text, with `changes` made to the scan of h16d128."""
    file = tmp_path / "base.json"
    file.write_text(inspection.to_json(base))

    def run(threshold: float = 0.05, **changes) -> tuple[int, str]:
        head = copy.deepcopy(base)
        head["launches"][1] |= changes
        monkeypatch.setattr(inspection, "inspect", lambda target: head)
        return run_static_gate(str(file), "sm_90", threshold)

    return run


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| kernel")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def sass(**counts: int) -> dict:
    return dict.fromkeys(CLASSES, 100) | {"local_memory": 0} | counts


SCAN = ["scan_fwd_kernel", "h16d128"]


@pytest.mark.parametrize(
    ("changes", "figure", "values"),
    [
        ({"stack_bytes": 8}, "stack_bytes", ["0", "8", ""]),
        ({"num_stages": 1, "code_bytes": 8000}, "num_stages", ["2", "1", "-50.0%"]),
        ({"programs_per_multiprocessor": 1}, "programs_per_multiprocessor", ["2", "1", "-50.0%"]),
        ({"sass": sass(tensor_core=109)}, "tensor_core instructions", ["100", "109", "+9.0%"]),
        ({"sass": sass(local_memory=9)}, "local_memory instructions", ["0", "9", ""]),
    ],
)  # fmt: skip
def test_worse_is_named(gate, changes: dict, figure: str, values: list[str]) -> None:
    code, text = gate(**changes)
    assert code == 1
    assert text.startswith("**Static gate: 1 of 3 launches are worse** than at ")
    first = rows(text)[0]
    assert first[:2] == SCAN
    assert first[2].startswith("BK=128 BV=32 C=64, 4 warps, ")
    assert first[3:] == [figure, *values]
    assert text.count("prepare_fwd_kernel") == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 210},  # as many programs as before
        {"shared_bytes": 110_000},
        {"sass": sass(tensor_core=105)},  # at the threshold
        {"sass": sass(barriers=108)},  # few instructions
        {"sass": sass(other=50), "stack_bytes": 0},
        {"programs_per_multiprocessor": 3, "registers": 128},
        {"num_stages": 1},  # the code is the same: nothing was pipelined
        {"num_stages": 3, "code_bytes": 9000},
        {"ptx": sass(other=300)},  # what the assembler makes of it counts
    ],
)
def test_not_worse(gate, changes: dict) -> None:
    code, text = gate(**changes)
    assert code == 0
    assert text.startswith("**Static gate: no launch is worse** than at ")
    assert "\nWorse:" not in text


def test_what_explains_a_verdict_is_shown_beside_it(gate) -> None:
    code, text = gate(registers=255, programs_per_multiprocessor=1, stack_bytes=0)
    assert code == 1
    assert [row[3] for row in rows(text)] == ["programs_per_multiprocessor", "registers"]
    assert text.index("Other differences:") < text.index("| registers |")


def test_threshold(gate) -> None:
    assert gate(threshold=0.2, sass=sass(tensor_core=115))[0] == 0
    assert gate(threshold=0.1, sass=sass(tensor_core=115))[0] == 1
    assert gate(threshold=0.0, sass=sass(tensor_core=109))[0] == 1


def test_new_and_gone_launches_are_rows(base: Inspection) -> None:
    head = copy.deepcopy(base)
    head["launches"][2]["case"] = "another"
    found = compare(base, head, 0.05)
    assert [(it.case, it.head, it.worse) for it in found] == [("another", "new", False), ("d64", "gone", False)]


def test_a_renamed_kernel_that_spills_is_worse(base: Inspection) -> None:
    head = copy.deepcopy(base)
    head["launches"][1] |= {"kernel": "other_kernel", "stack_bytes": 4000}
    found = compare(base, head, 0.05)
    assert [(it.kernel, it.head, it.worse) for it in found] == [
        ("other_kernel", "new", False), ("other_kernel", 4000, True), ("scan_fwd_kernel", "gone", False)
    ]  # fmt: skip
    head["launches"][1]["case"] = "a new one"
    assert not any(it.worse for it in compare(base, head, 0.05))


def test_a_head_that_compiles_nothing_is_an_error(base: Inspection) -> None:
    with pytest.raises(RuntimeError, match="nothing was compiled here"):
        compare(base, base | {"launches": []}, 0.05)


def test_a_case_that_is_refused_now_is_worse(base: Inspection) -> None:
    head = copy.deepcopy(base)
    head["launches"].pop()
    head["unsupported"]["d64"] = "needs more shared memory"
    found = compare(base, head, 0.05)
    assert [(it.case, it.kernel, it.head, it.worse) for it in found] == [
        ("d64", "scan_fwd_kernel", "unsupported", True)
    ]
    assert compare(head, base, 0.05)[0].worse is False


def test_launches_of_one_kernel_are_told_apart(base: Inspection) -> None:
    base["launches"].append(make_launch("d64", "scan_fwd_kernel", stack_bytes=64))
    assert compare(base, copy.deepcopy(base), 0.05) == []


@pytest.mark.parametrize(("name", "value"), [("triton", "3.9.0"), ("ptxas", "13.4.59")])
def test_another_compiler_is_an_error(base: Inspection, name: str, value: str, tmp_path, monkeypatch) -> None:
    file = tmp_path / "base.json"
    file.write_text(inspection.to_json(base))
    monkeypatch.setattr(inspection, "inspect", lambda target: base | {name: value})
    code, text = run_static_gate(str(file))
    assert code == 4
    assert text.startswith(f"static gate: the base was compiled with {name} {base[name]}, here it is {value}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "base.json cannot be read (No such file or directory): mdnbench inspect --out "),
        ("{", "is not JSON"),
        ('{"schema_version": 0}', "is no inspection of schema version 1: make it again"),
        (
            '{"schema_version": 1, "launches": [{"case": "d64"}]}',
            "is an inspection with figures missing: make it again",
        ),
    ],
)
def test_files_that_are_no_inspection(content: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    if content is not None:
        file.write_text(content)
    code, text = run_static_gate(str(file))
    assert code == 4
    assert words in text
    assert "\n" not in text


def test_a_file_of_another_target(base: Inspection, tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    file.write_text(inspection.to_json(base | {"target": "sm_80"}))
    assert run_static_gate(str(file)) == (
        4,
        f"static gate: {file} is of sm_80: give --target sm_80, or another file",
    )


def test_bad_arguments() -> None:
    code, text = run_static_gate("HEAD", target="sm_1")
    assert (code, text) == (4, "static gate: --target 'sm_1' is unknown: choose from sm_80, sm_89, sm_90")
    assert run_static_gate("HEAD", threshold=-1.0)[0] == 4


def test_not_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(static_gate, "__file__", str(tmp_path / "bench" / "static_gate.py"))
    code, text = run_static_gate("HEAD")
    assert code == 4
    assert "not run from a git checkout: give the file of an inspection as --base" in text


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton")
    root = tmp_path_factory.mktemp("repository")
    for name in ("kernels", "baselines", "bench", "reports"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "published"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / ".gitignore").write_text("__pycache__/\nimports/\nbuild/\n*.egg-info/\n")
    git(root, "init", "--quiet")
    shutil.move(root / "bench" / "inspection.py", root / "aside.py")
    git(root, "add", "bench", "kernels", "baselines", "reports", "pyproject.toml", "README.md", "LICENSE")
    git(root, "commit", "--quiet", "-m", "before mdnbench inspect")
    git(root, "tag", "old")
    shutil.move(root / "aside.py", root / "bench" / "inspection.py")
    with open(root / "bench" / "inspection.py", "a") as file:
        file.write('\nCASES = {name: CASES[name] for name in ("h16d128", "h16d128, decoding")}\n')
        file.write('_TUNED = Path("none")\n')
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "base")
    packages = root / "imports" / "mdnbench"
    packages.mkdir(parents=True)
    for name in ("kernels", "baselines", "bench", "reports"):
        (packages / name).symlink_to(root / name)
    return root


class TestOnCommits:
    """`mdnbench gate --static` of a repository that holds a copy of this one, with two cases to compile."""

    @pytest.fixture
    def run(self, repository: Path):
        def run(*arguments: str) -> subprocess.CompletedProcess:
            code = "import sys; from mdnbench.bench.cli import main; sys.exit(main(sys.argv[1:]))"
            command = [sys.executable, "-c", code, "gate", "--static", *arguments]
            variables = os.environ | {"PYTHONPATH": str(repository / "imports")}
            return subprocess.run(command, cwd=repository, env=variables, capture_output=True, text=True)

        yield run
        git(repository, "checkout", "--quiet", ".")

    def test_fewer_stages_and_a_spill(self, repository: Path, run) -> None:
        """In the working tree, which is compared with HEAD by default."""
        with open(repository / "kernels" / "config.py", "a") as file:
            file.write("\n_choose = choose_config\n")
            file.write("def choose_config(*arguments):\n    return replace(_choose(*arguments), scan_stages=1)\n")
        with open(repository / "kernels" / "recurrent.py", "a") as file:
            file.write("\n_default = default_config\n")
            file.write("def default_config(*arguments):\n    return RecurrentConfig(_default(*arguments).BV, 1)\n")
        done = run()
        assert done.returncode == 1, done.stderr
        assert "**Static gate: 2 of 4 launches are worse** than at HEAD" in done.stdout
        worse = rows(done.stdout.partition("Other differences")[0])
        assert {(row[0], row[1]) for row in worse} == {tuple(SCAN), ("recurrent_fwd_kernel", "h16d128, decoding")}
        stages = next(row for row in worse if row[3] == "num_stages")
        assert stages[:2] == SCAN
        assert stages[4:] == ["2", "1", "-50.0%"]
        assert ", 4 warps, 1 stage " in f"{stages[2]} "
        spill = next(row for row in worse if row[3] == "stack_bytes")
        assert spill[0] == "recurrent_fwd_kernel"
        assert spill[4] == "0"
        assert int(spill[5]) > 0

    def test_an_unrelated_change(self, repository: Path, run, tmp_path: Path) -> None:
        for name in ("kernels/scan.py", "kernels/config.py", "bench/sweep.py"):
            with open(repository / name, "a") as file:
                file.write("\n# A comment, and a function that nothing calls.\ndef unused():\n    return 1\n")
        markdown = tmp_path / "gate.md"
        done = run("--base", "HEAD", "--markdown", str(markdown))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith("**Static gate: no launch is worse** than at HEAD (4 launches compiled for sm_90")
        assert "Other differences" not in done.stdout
        assert markdown.read_text() == done.stdout

    def test_bases_that_do_not_serve(self, run) -> None:
        done = run("--base", "nowhere")
        assert done.returncode == 4
        assert done.stderr.startswith("mdnbench: static gate: --base 'nowhere' is no revision of ")
        done = run("--base", "old")
        assert done.returncode == 4
        assert "is older than mdnbench inspect: choose a later revision" in done.stderr
        assert done.stdout == ""
