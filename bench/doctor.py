"""Known-bad combinations of hardware, driver and versions, as a table of rules over `environment.collect()`.

An error makes results wrong, or keeps the GPU out of use; a warning concerns some code or some use only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .environment import Environment


@dataclass(frozen=True)
class Rule:
    """One combination known to be bad.

    Attributes:
        name: short and stable, for `--json`.
        level: "error" or "warning".
        applies: whether an environment has it. Facts that are absent (None) never apply.
        means: what goes wrong, in one or two sentences.
        remedy: what to do about it.
    """

    name: str
    level: str
    applies: Callable[[Environment], bool]
    means: str
    remedy: str


def number(version: str | None) -> tuple[int, ...]:
    """(3, 7, 1) of "3.7.1+git"; the empty tuple of None, which compares below every version."""
    return tuple(int(part) for part in re.findall(r"\d+", (version or "").split("+")[0])[:3])


def _between(version: str | None, low: str, below: str) -> bool:
    return bool(version) and number(low) <= number(version) < number(below)


def _hopper(env: Environment) -> bool:
    return bool(env["gpu"]) and env["gpu"]["compute_capability"] == "9.0"


def _ptxas(env: Environment) -> str | None:
    return env["ptxas"] and env["ptxas"]["version"]


def _driver_too_old(env: Environment) -> bool:
    return bool(env["gpu"]) and bool(env["torch_cuda"]) and env["torch_sees_cuda"] is False


RULES = (
    Rule(
        "torch-missing",
        "error",
        lambda env: env["torch"] is None or env["torch_error"] is not None,
        "PyTorch is not installed or fails to import: nothing can be measured.",
        "install it as pytorch.org says for your GPU, or reinstall it where the import fails",
    ),
    Rule(
        "torch-old",
        "error",
        lambda env: _between(env["torch"], "0", "2.6"),
        "mdnbench needs PyTorch 2.6 or newer.",
        "pip install --upgrade torch",
    ),
    Rule(
        "triton-old",
        "error",
        lambda env: _between(env["triton"], "0", "3.3"),
        "mdnbench needs Triton 3.3 or newer.",
        "install a newer PyTorch: each release brings the Triton it was built for",
    ),
    Rule(
        "triton-missing",
        "error",
        lambda env: bool(env["gpu"]) and env["triton"] is None,
        "There is a GPU but no Triton: no GPU kernel can run, only the PyTorch forms.",
        "pip install triton (Linux), in the version that your PyTorch names as its dependency",
    ),
    Rule(
        "driver-missing",
        "error",
        lambda env: env["nvidia_hardware"] and not env["gpu"],
        "This machine has an NVIDIA GPU, but no driver answers, or CUDA_VISIBLE_DEVICES or the container hides it.",
        "install or load the NVIDIA driver until nvidia-smi lists the GPU; unset CUDA_VISIBLE_DEVICES; start the "
        "container with the GPU",
    ),
    Rule(
        "torch-without-cuda",
        "error",
        lambda env: bool(env["gpu"]) and env["torch"] is not None and not env["torch_error"] and not env["torch_cuda"],
        "There is a GPU, but this PyTorch is a CPU build and will not use it.",
        "install the CUDA build of PyTorch (PyPI's default on Linux)",
    ),
    Rule(
        "cuda-unavailable",
        "error",
        _driver_too_old,
        "PyTorch is a CUDA build and the driver lists a GPU, but PyTorch cannot use it: most often the driver is older "
        "than this PyTorch's CUDA.",
        "update the NVIDIA driver, or install the PyTorch build for the CUDA version that nvidia-smi shows",
    ),
    Rule(
        "hopper-ptxas",
        "error",
        lambda env: _hopper(env) and _between(_ptxas(env), "0", "13"),
        "On Hopper (compute capability 9.0) ptxas before 13 miscompiles kernels that feed tensor cores from registers: "
        "wrong results or illegal memory accesses. Triton 3.4 to 3.8 bundle such a ptxas.",
        "set TRITON_PTXAS_PATH to the ptxas of CUDA 13.3 or newer, or use Triton 3.9, which bundles 13.4; clear the "
        "Triton cache after it",
    ),
    Rule(
        "hopper-ptxas-13",
        "warning",
        lambda env: _hopper(env) and _between(_ptxas(env), "13", "13.3"),
        "ptxas 13.0 to 13.2 still miscompiles some kernels on Hopper (compute capability 9.0).",
        "set TRITON_PTXAS_PATH to the ptxas of CUDA 13.3 or newer, or use Triton 3.9; believe no row that `mdnbench "
        "check` does not confirm",
    ),
    Rule(
        "hopper-triton",
        "warning",
        lambda env: _hopper(env) and _between(env["triton"], "3.4", "3.7.1"),
        "On Hopper, Triton 3.4 to 3.7.0 gives wrong gradients for products with a transposed accumulator. The backward "
        "of fla-core's gated delta rule refuses to run there; gdn-fla makes it run, and its rows say what comes of it.",
        "use Triton 3.7.1 or newer (PyTorch 2.8 to 2.11 pin 3.4 to 3.6)",
    ),
    Rule(
        "interpreter-on",
        "error",
        lambda env: env["triton_interpret"],
        "TRITON_INTERPRET is set: Triton kernels run in the interpreter, so their times mean nothing, and bfloat16 "
        "products and sums are wrong.",
        "unset TRITON_INTERPRET",
    ),
    Rule(
        "interpreter-numpy",
        "warning",
        lambda env: _between(env["triton"], "3.6", "3.7") and number(env["numpy"]) >= (2, 4),
        "Triton 3.6 with NumPy 2.4 or newer fails in the interpreter (TRITON_INTERPRET=1) on loop bounds computed from "
        "an argument. Compiled kernels are unaffected.",
        "pip install 'numpy<2.4', or use Triton 3.7.1 or newer",
    ),
    Rule(
        "block-pointers",
        "warning",
        lambda env: number(env["triton"]) >= (3, 9) and _between(env["packages"].get("fla-core"), "0", "0.6"),
        "Triton 3.9 has no tl.make_block_ptr, which the kernels of fla-core before 0.6 use: they raise.",
        "pip install --upgrade fla-core flash-linear-attention",
    ),
    Rule(
        "no-gpu",
        "warning",
        lambda env: not env["nvidia_hardware"],
        "No NVIDIA GPU here: only the PyTorch forms run, on the CPU. Their times say nothing about GPU kernels.",
        "nothing to do for a trial; run on a GPU machine for results",
    ),
)


def diagnose(environment: Environment) -> list[Rule]:
    """The rules that apply to an environment, errors first."""
    return sorted((rule for rule in RULES if rule.applies(environment)), key=lambda rule: rule.level != "error")


def facts(environment: Environment) -> list[tuple[str, str]]:
    """What the rules look at, as (name, value) rows for people; what is absent reads "none"."""
    gpu, ptxas, cpu = environment["gpu"], environment["ptxas"], environment["cpu"]
    torch = environment["torch_error"] or environment["torch"]
    if environment["torch_cuda"]:
        torch = f"{torch} (CUDA {environment['torch_cuda']})"
    rows = [
        ("system", environment["os"]),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, {cpu['usable_threads']} threads usable"),
        ("GPU", gpu and f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, sm {gpu['compute_capability']}"),
        ("driver", gpu and f"{gpu['driver']} (CUDA up to {gpu['driver_cuda']})"),
        ("Python", environment["python"]),
        ("torch", torch),
        ("triton", environment["triton"]),
        ("ptxas", ptxas and f"{ptxas['version']} ({'from Triton' if ptxas['bundled'] else 'set by environment'})"),
        ("numpy", environment["numpy"]),
        *environment["packages"].items(),
        ("mdnbench", environment["mdnbench"]),
    ]
    return [(name, value or "none") for name, value in rows]
