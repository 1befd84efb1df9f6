"""What a run ran on: hardware, driver, versions, and the state of the code. Absent is None; nothing here fails.

No host name, user name or path is stored, so that the file can be published with the results.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata, util
from pathlib import Path
from typing import Any

import psutil

from mdnbench.baselines.provider import ENTRY_POINT_GROUP

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "fla-core", "flash-linear-attention", "mamba-ssm", "causal-conv1d", "flash-attn", "flash-attn-3", "flash-attn-4",
    "flash-qla", "flash-kda", "tilelang", "einops",
)  # fmt: skip

Environment = dict[str, Any]


def collect(device: str | None = None) -> Environment:
    """Describe this machine and this installation.

    Args:
        device: "cpu", "cuda" or "cuda:N", what the run measures on; None when nothing is run. Of several GPUs, the one
            it names is described.

    Returns:
        A dictionary for JSON: time (ISO 8601, UTC), device ("cpu" or "cuda") and device_name; os, cpu, memory_bytes,
        gpu, gpu_count, nvidia_hardware (whether there is an NVIDIA GPU, usable or not); python, torch, torch_cuda (the
        version it was built for), torch_sees_cuda, torch_error, triton, triton_interpret, ptxas, numpy, packages,
        mdnbench, git_commit, git_dirty.
    """
    kind, _, index = (device or "").partition(":")
    gpus = _gpus()
    gpu = gpus[int(index or 0)] if int(index or 0) < len(gpus) else None
    cpu = _cpu()
    names = {"cpu": cpu["model"], "cuda": gpu and gpu["name"]}
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": kind or None,
        "device_name": names.get(kind),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "gpu_count": len(gpus),
        "nvidia_hardware": bool(gpus) or _nvidia_on_pci(),
        "python": platform.python_version(),
        **_torch(),
        "triton": version("triton"),
        "triton_interpret": os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"),
        "ptxas": ptxas(int(gpu["compute_capability"].replace(".", "")) if gpu else 90),
        "numpy": version("numpy"),
        "packages": {name: version(name) for name in (*PACKAGES, *_provider_packages())},
        "mdnbench": version("mdnbench"),
        **_git(Path(__file__).resolve()),
    }


def identity(environment: Environment) -> dict[str, str | None]:
    """The part that must agree before rows of two runs may share one file: times of other hardware or compilers do not
    compare."""
    gpu = environment.get("gpu") if environment.get("device") == "cuda" else None
    return {
        "device": environment.get("device"),
        "device_name": environment.get("device_name"),
        "torch": environment.get("torch"),
        "triton": environment.get("triton"),
        "driver": gpu and gpu.get("driver"),
        "mdnbench": environment.get("mdnbench"),
        **environment.get("packages", {}),
    }


def write(environment: Environment, folder: Path) -> None:
    """Keep an environment as environment.json in a run folder, which is made when absent.

    Raises:
        ValueError: when the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ENVIRONMENT_FILE).write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    except OSError as fault:
        raise ValueError(
            f"--out {str(folder)!r} cannot be written to ({fault.strerror}): choose another folder"
        ) from None


def code_difference(environment: Environment, folder: Path) -> str | None:
    """How the code of `environment` differs from that of the environment.json in a run folder, in words; None where it
    does not, and where nothing is kept.

    Raises:
        ValueError: when the file is not JSON.
    """
    file = folder / ENVIRONMENT_FILE
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"--resume: {file} is damaged: remove it to go on without") from None
    was, now = _code(before), _code(environment)
    return None if was == now else f"{was} before, {now} now"


def _code(environment: Environment) -> str:
    commit = environment.get("git_commit")
    if commit is None:
        return "no git commit"
    return f"commit {commit[:7]}{' with changes' if environment.get('git_dirty') else ''}"


def version(package: str) -> str | None:
    """Version of an installed distribution, None where it is not installed. Imports nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _provider_packages() -> list[str]:
    """The distributions that register providers of their own."""
    found = metadata.entry_points(group=ENTRY_POINT_GROUP)
    return sorted({entry_point.dist.name for entry_point in found if entry_point.dist} - set(PACKAGES))


def _torch() -> Environment:
    facts: Environment = {"torch": version("torch"), "torch_cuda": None, "torch_sees_cuda": None, "torch_error": None}
    if facts["torch"] is None:
        return facts
    try:
        import torch
    except Exception as fault:  # a broken installation is a finding, not a failure of ours
        facts["torch_error"] = f"{type(fault).__name__}: {fault}".splitlines()[0]
        return facts
    facts["torch_cuda"] = torch.version.cuda
    facts["torch_sees_cuda"] = torch.cuda.is_available()
    return facts


def _cpu() -> Environment:
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        usable = os.cpu_count()
    return {
        "model": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(logical=True),
        "usable_threads": usable,
    }


def _cpu_model() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = _output("sysctl", "-n", "machdep.cpu.brand_string")
        return text or platform.processor() or None
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or None


def _gpus() -> list[Environment]:
    """The visible NVIDIA GPUs, in the order of CUDA_VISIBLE_DEVICES where that is set."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or one that does not answer
        return []
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = list(range(pynvml.nvmlDeviceGetCount())) if visible is None else visible.split(",")
        driver = pynvml.nvmlSystemGetDriverVersion()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return [_gpu(pynvml, str(name).strip(), driver, cuda) for name in names if str(name).strip() not in ("", "-1")]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, name: str, driver: str, cuda: int) -> Environment:
    by_index = name.isdigit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(name)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "compute_capability": f"{major}.{minor}",
        "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "driver": driver,
        "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
    }


def _nvidia_on_pci() -> bool:
    """Whether the bus holds an NVIDIA display or compute device, driver or not. Linux only."""
    for folder in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (folder / "vendor").read_text().strip(), (folder / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def ptxas(arch: int) -> Environment | None:
    """The assembler Triton will call for a GPU of compute capability arch / 10: Triton bundles several.

    Returns:
        version, bundled (whether it is Triton's own) and arch; None where there is none.
    """
    if util.find_spec("triton") is None:
        return None
    try:
        from triton.backends.nvidia import compiler

        try:
            tool = compiler.get_ptxas(arch)
        except TypeError:  # Triton 3.4 and before take no architecture
            tool = compiler.get_ptxas()
        path = tool[0] if isinstance(tool, tuple) else tool.path
    except (ImportError, AttributeError, RuntimeError):  # private to Triton, so it may move; or no ptxas was found
        return None
    release = re.search(r"V(\d+\.\d+\.\d+)", _output(path, "--version") or "")
    bundled = Path(util.find_spec("triton").origin).resolve().parent in Path(path).resolve().parents
    return {"version": release and release[1], "bundled": bundled, "arch": arch}


def _git(file: Path) -> Environment:
    """Commit of the checkout that `file` belongs to; None where it was installed from a package."""
    folder = str(file.parent)
    tracked = _output("git", "-C", folder, "ls-files", "--error-unmatch", file.name)
    commit = _output("git", "-C", folder, "rev-parse", "HEAD") if tracked else None
    changes = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


def _output(*command: str) -> str | None:
    """What a command prints, None when it is absent or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
