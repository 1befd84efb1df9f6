"""`mdnbench profile` with the authors' fork of fla beside fla: each provider is recorded in a process of its own."""

import json

import pytest

from mdnbench.bench.cli import main

ON_CPU = """
from mdnbench.baselines.gdn import GdnFla
from mdnbench.baselines.mdn import MdnAuthors

class Authors(MdnAuthors):
    name = "authors-on-cpu"
    devices = ("cpu",)

    def _supports(self, workload, mode):
        return None

class Fla(GdnFla):
    name = "fla-on-cpu"
    devices = ("cpu",)

class Broken(Fla):
    name = "broken-on-cpu"

    def build(self, workload, inputs):
        raise RuntimeError("no such kernel")

class Dies(Fla):
    name = "dies-on-cpu"

    def build(self, workload, inputs):
        import os
        os.abort()
"""


@pytest.fixture
def on_cpu(tmp_path, monkeypatch, peers, authors_checkout):
    """Adapters that take the fakes of their packages on a CPU, registered as another package's."""
    folder = tmp_path / "on_cpu"
    info = folder / "on_cpu-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "on_cpu.py").write_text(ON_CPU)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: on-cpu\nVersion: 1.0\n")
    names = ("Authors", "Fla", "Broken", "Dies")
    lines = ["[mdnbench.providers]", *(f"{name} = on_cpu:{name}" for name in names), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(folder)


def profile(names: str, out) -> int:
    arguments = f"profile {names} --seq-len 16 --head-dim 16 --heads 1 --dtype bfloat16 --calls 1 --device cpu"
    return main([*arguments.split(), "--out", str(out)])


def recorded(out) -> list[str]:
    return [row["provider"] for row in json.loads((out / "profile.json").read_text())]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("names", [("authors-on-cpu", "fla-on-cpu"), ("fla-on-cpu", "authors-on-cpu")])
def test_two_packages_called_fla_do_not_meet(names, tmp_path, capsys) -> None:
    assert profile(" ".join(names), tmp_path / "out") == 0, capsys.readouterr().err
    assert recorded(tmp_path / "out") == list(names)


@pytest.mark.usefixtures("on_cpu")
def test_what_fails_has_its_line_and_the_exit_code_and_harms_no_other(tmp_path, capsys) -> None:
    assert profile("dies-on-cpu broken-on-cpu fla-on-cpu", tmp_path / "out") == 1
    assert recorded(tmp_path / "out") == ["fla-on-cpu"]
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("mdnbench: dies-on-cpu failed: the process was killed by SIGABRT during the recording")
    assert second == "mdnbench: broken-on-cpu failed: RuntimeError: no such kernel"
    assert third.endswith("out/worker.log")
