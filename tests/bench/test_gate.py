"""The gate: revisions of a small repository, installed and told apart; verdicts, exit codes and what goes wrong.

The repository holds a package that registers a provider, as a user's own would. Blocks are scripted, except in one gate
that measures. `MDNBENCH_TEST_GATE=1` runs a gate of this repository as well, which takes some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mdnbench.bench import gate, paired, parse, revisions
from mdnbench.bench.cli import main
from mdnbench.bench.floors import Floors
from mdnbench.bench.gate import Gate, run_gate
from mdnbench.bench.regress import HEAD
from mdnbench.bench.requests import Failure, Prepared
from mdnbench.bench.results import Point, append_record, read_records
from mdnbench.bench.revisions import GateError
from mdnbench.bench.spec import SweepSpec, plan
from mdnbench.bench.sweep import make_record

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "slowable"
version = "1.0"
[project.entry-points."mdnbench.providers"]
slowable = "slowable:Slowable"
[tool.setuptools]
py-modules = ["slowable"]
"""
PROVIDER = '''
from mdnbench.baselines import gdn

class Slowable(gdn.GdnTorch):
    """As gdn-torch, with REPEATS further forward passes."""

    name = "gdn-slowable"
    REPEATS = 0

    def build(self, workload, inputs):
        call = super().build(workload, inputs)

        def slow():
            for _ in range(self.REPEATS):
                call()
            return call()

        return slow
'''
SPEC = SweepSpec(
    "gate", gate.ANY_PROVIDER, seq_lens=(64,), head_dims=((16, 16),), chunk_sizes=(32,), modes=("forward",), heads=2,
    time_limit_s=0.05,
)  # fmt: skip
ENVIRONMENT = {"device": "cpu", "device_name": "Some CPU 9000", "packages": {}}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with the commits fast, slow and broken, which does not install; HEAD is fast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    files = {
        "fast": (PYPROJECT, PROVIDER),
        "slow": (PYPROJECT, PROVIDER.replace("REPEATS = 0", "REPEATS = 1")),
        "broken": (PYPROJECT.replace('version = "1.0"', 'version = "one"'), PROVIDER),
    }
    for name, (project, code) in files.items():
        (folder / "pyproject.toml").write_text(project)
        (folder / "slowable.py").write_text(code)
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", name)
        git(folder, "tag", name)
    git(folder, "reset", "-q", "--hard", "fast")
    monkeypatch.chdir(folder)
    return folder


def scripted(times: dict[str, float], failing: str | None = None):
    """A block runner: a provider takes 1 ms, in the head `times` as long, and `failing` crashes there. Blocks differ by
    up to 0.4 %."""
    count = 0

    def run(side, spec, out, log):
        nonlocal count
        count += 1
        out.mkdir()
        for point in points_of(spec):
            factor = times.get(point.provider, 1.0) if side.name == HEAD else 1.0
            failure = Failure("crashed", "SIGSEGV") if side.name == HEAD and point.provider == failing else None
            samples = [factor * (1 + (count * 7 % 5) / 1000 + k / 1e4) for k in range(10)]
            append_record(out, make_record(point, "gdn", 0, Prepared(threads=1), samples, failure))

    return run


def points_of(spec: SweepSpec) -> list[Point]:
    """As `plan`, for gdn-slowable too, which is not installed in this process."""
    points = plan(replace(spec, providers=("gdn-torch",)))
    return [replace(point, provider=name) for name in spec.providers for point in points]


def wanted(repository: Path, base: str = "fast", head: str | None = "slow", **options) -> Gate:
    return Gate(repository, base, head, SPEC, **{"providers": ["gdn-slowable"], "pairs": 8, **options})


def test_each_side_runs_its_own_code_and_nothing_stays_behind(repository: Path, tmp_path: Path) -> None:
    """Two pairs are measured: the slow side takes twice as long, whatever the noise."""
    found = run_gate(wanted(repository, pairs=2, rounds=1), tmp_path / "out", ENVIRONMENT)
    (change,) = found.changes
    assert 1.4 < change.ratio < 3.5
    assert change.verdict == "undecided"  # of two pairs, none can be significant
    assert found.exit_code == 3
    assert any("2 pairs cannot show that one of 1 points is slower: use --blocks 12" in note for note in found.notes)
    facts = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert facts["base"]["source_hash"] != facts["head"]["source_hash"]
    assert facts["base"]["packages"] == ["slowable"]
    names = sorted(path.name for path in (tmp_path / "out").glob("0*"))
    assert names == ["000-base", "001-head", "002-head", "003-base"]
    assert read_records(tmp_path / "out" / "000-base")[0].threads == 1
    assert git(repository, "worktree", "list").count("\n") == 0
    assert git(repository, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("factor", "verdict", "code", "blocks"), [(1.1, "slower", 1, 16), (1.0, "same", 0, 16), (0.8, "faster", 0, 16)]
)
def test_verdicts(repository: Path, tmp_path: Path, factor: float, verdict: str, code: int, blocks: int) -> None:
    run_block = scripted({"gdn-slowable": factor})
    found = run_gate(wanted(repository), tmp_path / "out", ENVIRONMENT, run_block=run_block)
    assert [change.verdict for change in found.changes] == [verdict]
    assert found.exit_code == code
    assert len(list((tmp_path / "out").glob("0*"))) == blocks


def test_what_is_undecided_is_measured_again_up_to_three_rounds(repository: Path, tmp_path: Path) -> None:
    run_block = scripted({"gdn-slowable": 1.032})  # at the threshold: 3 % to 3.4 %
    noisy = [0.0, 0.1, -0.1, 0.08, -0.09, 0.1, -0.1, 0.1]
    point = points_of(replace(SPEC, providers=("gdn-slowable",)))[0]
    for _ in range(2):  # the floor is the median over gates: one noisy gate would not count
        Floors(gate.machine(ENVIRONMENT), SPEC.time_limit_s).add({point: noisy})
    found = run_gate(wanted(repository), tmp_path / "out", ENVIRONMENT, run_block=run_block)
    assert found.exit_code == 3
    assert len(list((tmp_path / "out").glob("0*"))) == 3 * 16
    assert found.changes[0].floor > 0.032


def test_the_working_tree_is_measured_with_its_changes(repository: Path, tmp_path: Path) -> None:
    (repository / "slowable.py").write_text(PROVIDER.replace("REPEATS = 0", "REPEATS = 2"))
    (repository / "untracked.txt").write_text("x")
    side = revisions.install(repository, HEAD, None, tmp_path, tmp_path / "log")
    assert "REPEATS = 2" in (side.folder / "slowable.py").read_text()
    assert side.label.startswith("working tree, commit ")
    assert side.label.endswith(" with 2 changed files")
    found = run_gate(wanted(repository, head="fast"), tmp_path / "out", ENVIRONMENT, run_block=scripted({}))
    assert any("has 2 changed files that --head fast does not hold" in note for note in found.notes)
    assert any("Both sides hold the same code" in note for note in found.notes)


def lose_the_provider(repository: Path) -> None:
    """In the working tree: the module is gone, and the entry point leads nowhere."""
    git(repository, "rm", "-q", "slowable.py")
    (repository / "other.py").write_text("")
    (repository / "pyproject.toml").write_text(
        PYPROJECT.replace('py-modules = ["slowable"]', 'py-modules = ["other"]').replace("slowable:Slowable", "other:X")
    )


def test_a_provider_that_the_head_lost_is_gone(repository: Path, tmp_path: Path) -> None:
    lose_the_provider(repository)
    asked = ["gdn-slowable", "gdn-torch"]
    found = run_gate(
        wanted(repository, head=None, providers=asked), tmp_path / "out", ENVIRONMENT, run_block=scripted({})
    )
    verdicts = {change.point.provider: change.verdict for change in found.changes}
    assert verdicts == {"gdn-torch": "same", "gdn-slowable": "gone"}
    assert "it does not exist; entry point slowable = other:X of slowable: AttributeError" in found.changes[-1].reason
    assert found.exit_code == 1
    alone = run_gate(wanted(repository, head=None), tmp_path / "alone", ENVIRONMENT, run_block=scripted({}))
    assert [change.verdict for change in alone.changes] == ["gone"]
    assert alone.exit_code == 1


def test_a_provider_that_the_base_lacks_is_new(repository: Path, tmp_path: Path) -> None:
    lose_the_provider(repository)
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "without")
    found = run_gate(wanted(repository, "HEAD", "fast"), tmp_path / "out", ENVIRONMENT, run_block=scripted({}))
    assert [change.verdict for change in found.changes] == ["new"]
    assert found.exit_code == 0


def test_the_folder_of_a_gate_is_no_change_of_the_working_tree(repository: Path) -> None:
    found = run_gate(wanted(repository, head=None), repository / "out", ENVIRONMENT, run_block=scripted({}))
    assert found.head.endswith("without changes")
    assert revisions.changed_files(repository) == []


def test_files_folders_and_links_change_into_one_another(repository: Path, tmp_path: Path) -> None:
    (repository / "a").mkdir()
    (repository / "a" / "x").write_text("x")
    (repository / "b").write_text("b")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "files")
    (repository / "a" / "x").unlink()
    (repository / "a").rmdir()
    (repository / "a").symlink_to("b")
    (repository / "b").unlink()
    (repository / "b").mkdir()
    (repository / "b" / "slowable2.py").write_text("")
    side = revisions.install(repository, HEAD, None, tmp_path, tmp_path / "log")
    assert "with 4 changed files" in side.label
    nested = repository / "nested"
    nested.mkdir()
    git(nested, "init", "-q")
    (nested / "file").write_text("")
    git(nested, "add", ".")
    git(nested, "commit", "-q", "-m", "nested")
    with pytest.raises(GateError, match="the working tree holds another git repository, nested/"):
        revisions.install(repository, "again", None, tmp_path, tmp_path / "log")


def test_a_fault_of_the_gate_itself_is_no_verdict(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(gate, "run_gate", breaks)
    assert main(["gate", "--base", "fast", "--out", "../out", "--markdown", "../verdict.md"]) == 4
    assert capsys.readouterr().err.splitlines()[-1] == "mdnbench: OSError: no space left"
    assert (repository.parent / "verdict.md").read_text() == "**No verdict:** OSError: no space left\n"


def test_a_provider_that_crashes_in_the_head_is_gone(repository: Path, tmp_path: Path) -> None:
    run_block = scripted({}, failing="gdn-slowable")
    found = run_gate(wanted(repository), tmp_path / "out", ENVIRONMENT, run_block=run_block)
    assert [change.verdict for change in found.changes] == ["gone"]
    assert found.changes[0].reason == "head: crashed: SIGSEGV"
    assert found.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--base nowhere", "--base 'nowhere' is no revision of"),
        ("--base fast --head nowhere", "--head 'nowhere' is no revision of"),
        ("--base fast --head broken", "head (broken, commit"),
        ("--base broken --head fast", "base (broken, commit"),
        ("--base fast --provider gdn-slowabel", "--provider 'gdn-slowabel' is in neither side: did you mean gdn-slow"),
        ("--base fast --provider attention-flash4", "no provider runs on both sides"),
    ],
)
def test_what_goes_wrong_is_one_line_and_exit_code_4(
    repository: Path, arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", *arguments.split(), "--out", "../out"]) == 4
    printed = capsys.readouterr()
    assert printed.out == ""
    line = printed.err.splitlines()[-1]
    assert line.startswith("mdnbench: ")
    assert words in line
    if "broken" in arguments:
        assert "does not install: " in line
        assert "metadata-generation-failed" not in line  # pip's last line, which does not say why
        assert (repository.parent / "out" / "gate.log").exists()


def test_code_from_elsewhere_is_no_verdict(repository: Path, tmp_path: Path) -> None:
    side = revisions.install(repository, HEAD, "fast", tmp_path, tmp_path / "log")
    (side.folder / "slowable.py").write_text("changed = 1\n")
    with pytest.raises(GateError, match="are not those that were installed"):
        gate.describe(side, SPEC, tmp_path)


def test_outside_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(GateError, match="is in no git repository"):
        revisions.repository_root(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("gate", "--base is missing"),
        ("gate --base x --threshold 3x", "--threshold '3x' is not between 0% and 100%"),
        ("gate --base x --blocks 1", "--blocks '1' is not a whole number of at least 2"),
        ("gate --base x --preset fast", "--preset 'fast' is unknown"),
        ("gate --base x --head=", "--head '' is empty: leave it out for the working tree"),
        ("gate --base x --provider ,", "--provider ',' is empty: leave it out for all"),
        ("gate --base x --markdown /proc/x.md", "--markdown '/proc/x.md' cannot be written"),
        ("gate --base x --target sm_90", "--target goes with --static"),
        ("gate --static --head x", "--static judges the code as it is here"),
        ("gate --static --blocks 8", "--blocks is of a gate by times: leave it out, or --static"),
        ("gate --static --json", "--json is of a gate by times"),
        ("compare nowhere nowhere", "RUN 'nowhere' has no results.jsonl"),
    ],
)
def test_bad_input(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert words in capsys.readouterr().err


def test_no_verdict_is_written_for_a_comment_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "verdict.md"
    for kind in (["--static"], ["--out", str(tmp_path / "out")]):
        assert main(["gate", "--base", "no-such-revision", *kind, "--markdown", str(file)]) == 4
        assert "--base 'no-such-revision' is no revision of" in (said := capsys.readouterr().err)
        assert file.read_text() == said.replace("mdnbench: ", "**No verdict:** ")


def test_the_command_prints_writes_and_exits_with_the_verdict(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "_run_sweep", scripted({"gdn-slowable": 1.2}))
    command = "gate --base fast --head slow --provider gdn-slowable --blocks 8 --out ../out --markdown ../c.md --json"
    assert main(command.split()) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["exit_code"] == 1
    assert {row["verdict"] for row in printed["changes"]} == {"slower"}
    assert len(printed["changes"]) == 2  # the lengths of the preset ci
    assert (repository.parent / "c.md").read_text().startswith("**Worse: 2 slower (gdn-slowable)**")


def test_floors_are_kept_by_machine_and_bounded(tmp_path: Path) -> None:
    point = points_of(replace(SPEC, providers=("gdn-slowable",)))[0]
    floors = Floors({"device_name": "A"}, 0.1, tmp_path)
    assert floors.load() == {}
    for _ in range(30):
        assert floors.add({point: [0.01, -0.02, 0.03, 0.04]})
    assert floors.load()[point.key] == [[0.01, -0.02, 0.03, 0.04]] * 10
    assert Floors({"device_name": "B"}, 0.1, tmp_path).load() == {}
    floors.path.write_text("{")
    assert floors.load() == {}
    (tmp_path / "file").write_text("")
    assert not Floors({}, 0.1, tmp_path / "file" / "x").add({})


def test_percent() -> None:
    assert parse.parse_percent("--threshold", "3%") == pytest.approx(0.03)
    assert parse.parse_percent("--threshold", "0.03") == pytest.approx(0.03)
    for text in ("-1%", "100%", "3", "nan", ""):
        with pytest.raises(ValueError, match="between 0% and 100%"):
            parse.parse_percent("--threshold", text)


@pytest.mark.skipif(not os.environ.get("MDNBENCH_TEST_GATE"), reason="takes minutes; MDNBENCH_TEST_GATE=1 runs it")
@pytest.mark.timeout(1800)
def test_a_gate_of_this_repository_against_itself(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = ["gate", "--base", "HEAD", "--head", "HEAD", "--out", str(tmp_path / "out"), "--provider", "attention"]
    before = os.getcwd()
    os.chdir(root)
    try:
        assert main(command) in (0, 3)
    finally:
        os.chdir(before)
    assert len(list((tmp_path / "out").glob("0*"))) >= paired.MIN_PAIRS * 2
