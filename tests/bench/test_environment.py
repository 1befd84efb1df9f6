"""The environment of a run: complete, free of private facts, and never a failure."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from mdnbench.bench import environment


@pytest.fixture(scope="module")
def here() -> environment.Environment:
    return environment.collect("cpu")


def test_it_names_the_machine_and_every_version(here: environment.Environment) -> None:
    assert here["torch"] == environment.version("torch")
    assert here["torch"].startswith(torch.__version__.split("+")[0])
    assert here["python"] == platform.python_version()
    assert here["device"] == "cpu"
    assert here["device_name"] == here["cpu"]["model"]
    assert here["device_name"]
    assert 1 <= here["cpu"]["usable_threads"] <= here["cpu"]["threads"]
    assert here["memory_bytes"] == psutil.virtual_memory().total
    assert set(here["packages"]) >= {"fla-core", "flash-linear-attention", "mamba-ssm", "flash-attn"}
    assert here["time"].endswith("+00:00")


def test_it_is_json_without_paths_or_names_of_host_and_user(here: environment.Environment) -> None:
    text = json.dumps(here)
    assert json.loads(text) == here
    assert str(Path.home()) + "/" not in text
    assert sys.prefix not in text
    assert str(Path(__file__).parent.parent.parent) not in text
    for name in (platform.node(), getpass.getuser()):
        assert f'"{name}"' not in text


@pytest.mark.skipif(environment.version("triton") is None, reason="needs Triton")
def test_ptxas_is_the_one_triton_would_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundled = environment.collect()["ptxas"]
    assert bundled["bundled"]
    assert bundled["version"].count(".") == 2
    other = tmp_path / "ptxas"
    other.write_text('#!/bin/sh\necho "Cuda compilation tools, release 13.3, V13.3.7"\n')
    other.chmod(0o755)
    variables = {"TRITON_PTXAS_PATH": str(other), "TRITON_PTXAS_BLACKWELL_PATH": str(other)}
    code = "from mdnbench.bench import environment as e; import json; print(json.dumps(e.collect()['ptxas']))"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, check=True)
    assert json.loads(run.stdout) == {"version": "13.3.7", "bundled": False, "arch": bundled["arch"]}


def test_it_survives_a_machine_where_nothing_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(environment, "version", lambda package: "1.0" if package == "torch" else None)
    monkeypatch.setattr(environment.util, "find_spec", lambda name: None)
    found = environment.collect("cuda:1")
    assert found["torch_error"].startswith("ModuleNotFoundError")
    assert found["device"] == "cuda"
    for name in ("device_name", "gpu", "triton", "ptxas", "git_commit", "git_dirty", "torch_cuda"):
        assert found[name] is None


def test_git_state_is_that_of_the_checkout_the_code_is_in(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        run = subprocess.run(["git", "-C", tmp_path, *names, *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    file, outside = tmp_path / "module.py", tmp_path / "ignored.py"
    file.write_text("1\n")
    outside.write_text("1\n")
    assert environment._git(file) == {"git_commit": None, "git_dirty": None}
    git("init", "-q")
    git("add", "module.py")
    git("commit", "-q", "-m", "first")
    assert environment._git(file) == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": False}
    assert environment._git(outside) == {"git_commit": None, "git_dirty": None}
    file.write_text("2\n")
    assert environment._git(file)["git_dirty"] is True


def test_identity_changes_with_what_changes_times(here: environment.Environment) -> None:
    same = here | {"time": "later", "git_commit": "other", "python": "3.99"}
    assert environment.identity(same) == environment.identity(here)
    for name in ("device_name", "torch", "triton", "mdnbench"):
        assert environment.identity(here | {name: "other"}) != environment.identity(here)
    upgraded = here | {"packages": here["packages"] | {"fla-core": "99"}}
    assert environment.identity(upgraded) != environment.identity(here)
    gpu = here | {"device": "cuda", "gpu": {"driver": "580.1"}}
    assert environment.identity(gpu) != environment.identity(gpu | {"gpu": {"driver": "580.2"}})


@pytest.mark.parametrize(
    ("commit", "dirty", "words"),
    [
        ("a" * 40, False, None),
        ("a" * 40, True, "commit aaaaaaa before, commit aaaaaaa with changes now"),
        ("b" * 40, False, "commit aaaaaaa before, commit bbbbbbb now"),
        (None, None, "commit aaaaaaa before, no git commit now"),
    ],
)
def test_another_state_of_the_code_is_put_into_words(
    here: environment.Environment, tmp_path: Path, commit: str | None, dirty: bool | None, words: str | None
) -> None:
    now = here | {"git_commit": commit, "git_dirty": dirty}
    assert environment.code_difference(now, tmp_path) is None  # nothing is kept there
    environment.write(here | {"git_commit": "a" * 40, "git_dirty": False}, tmp_path)
    assert environment.code_difference(now, tmp_path) == words


def test_packages_that_register_providers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "peer_kernels-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peer-kernels\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[mdnbench.providers]\npeer = peer_kernels:Peer\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.collect()["packages"]["peer-kernels"] == "1.5"


def test_a_folder_that_cannot_be_written_to_is_bad_input(here: environment.Environment, tmp_path: Path) -> None:
    environment.write(here, tmp_path / "a" / "b")
    assert json.loads((tmp_path / "a" / "b" / "environment.json").read_text()) == here
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^--out .*/file/x' cannot be written to .*: choose another folder$"):
        environment.write(here, tmp_path / "file" / "x")


def fake_nvml() -> SimpleNamespace:
    """An NVML of two GPUs, H200 and A100."""
    gpus = [("NVIDIA H200", (9, 0), "GPU-aa"), ("NVIDIA A100", (8, 0), "GPU-bb")]
    return SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlSystemGetDriverVersion=lambda: "580.65.06",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13010,
        nvmlDeviceGetHandleByIndex=lambda index: gpus[index],
        nvmlDeviceGetHandleByUUID=lambda uuid: next(gpu for gpu in gpus if gpu[2] == uuid),
        nvmlDeviceGetName=lambda gpu: gpu[0],
        nvmlDeviceGetCudaComputeCapability=lambda gpu: gpu[1],
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(total=80 * 2**30),
    )


@pytest.mark.parametrize(
    ("visible", "device", "name"),
    [
        (None, "cuda", "NVIDIA H200"),
        (None, "cuda:1", "NVIDIA A100"),
        ("1", "cuda", "NVIDIA A100"),
        ("1,0", "cuda:1", "NVIDIA H200"),
        ("GPU-bb", "cuda:0", "NVIDIA A100"),
        ("", "cuda", None),
        ("-1", "cuda", None),
        ("0", "cuda:1", None),
    ],
)
def test_the_gpu_is_the_visible_one_that_is_named(
    visible: str | None, device: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = environment.collect(device)
    assert found["device_name"] == name
    if name == "NVIDIA H200":
        assert found["gpu"] == {
            "name": name,
            "compute_capability": "9.0",
            "memory_bytes": 80 * 2**30,
            "driver": "580.65.06",
            "driver_cuda": "13.1",
        }
        assert environment.identity(found)["driver"] == "580.65.06"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_is_the_one_pytorch_uses() -> None:
    found = environment.collect("cuda")
    assert found["device_name"] == found["gpu"]["name"] == torch.cuda.get_device_name(0)
    major, minor = torch.cuda.get_device_capability(0)
    assert found["gpu"]["compute_capability"] == f"{major}.{minor}"
    assert found["gpu"]["driver"]
    assert found["torch_sees_cuda"] is True
    assert found["nvidia_hardware"] is True
