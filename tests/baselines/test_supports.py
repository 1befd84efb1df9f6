"""A provider that cannot run a workload says why in a sentence."""

import subprocess
import sys

import pytest

from mdnbench.baselines import gdn
from mdnbench.baselines.provider import Provider
from mdnbench.baselines.registry import get_provider
from mdnbench.baselines.workload import Workload

WORKLOAD = Workload(seq_len=64, head_dim_k=16, head_dim_v=16)
FLAT = WORKLOAD.with_(chunk_size=None)


@pytest.mark.parametrize(
    ("provider", "workload", "reason"),
    [
        ("gdn-torch", WORKLOAD.with_(chunk_size=48), "takes chunk sizes 16, 32, 64, 128 only, not 48"),
        ("mamba2-torch", WORKLOAD.with_(chunk_size=256), None),
        ("mamba2-torch", WORKLOAD.with_(gates="reset=-inf"), "an infinite decay has no finite write"),
        ("mamba2-torch", WORKLOAD.with_(gates="alpha=1"), "without any decay it writes nothing"),
        ("kda-torch", WORKLOAD.with_(gates="reset=-inf"), None),
        ("kda-torch", WORKLOAD.with_(gates="resets"), "gates='resets' is unknown: choose"),
        ("attention-sdpa-flash", FLAT, None),
        ("attention-sdpa-flash", FLAT.with_(head_dim_v=32), "needs head_dim_v equal to head_dim_k, not 32 beside 16"),
        ("attention-sdpa-flash", FLAT.with_(value_heads=8), "as many value heads as query heads, not heads=4, value_h"),
        ("attention-sdpa-flash", FLAT.with_(device="cuda"), "float16, bfloat16 only on a GPU, not float32"),
        (
            "attention-sdpa-flash",
            FLAT.with_(device="cuda", dtype="float16", head_dim_k=512, head_dim_v=512),
            "takes head dimensions up to 256 only, not 512",
        ),
        ("attention-sdpa-cudnn", FLAT, "runs on cuda only, not on cpu"),
        ("attention-sdpa-cudnn", FLAT.with_(device="cuda"), "takes float16, bfloat16 only, not float32"),
        (
            "attention-sdpa-cudnn",
            FLAT.with_(device="cuda", dtype="bfloat16", head_dim_v=512),
            "takes head dimensions up to 256 only, not 512",
        ),
        (
            "attention-sdpa-cudnn",
            FLAT.with_(device="cuda", dtype="bfloat16", head_dim_k=20),
            "takes head dimensions in multiples of 8 in bfloat16, not 20",
        ),
        (
            "attention-sdpa-efficient",
            FLAT.with_(device="cuda", head_dim_v=18),
            "takes head dimensions in multiples of 4 in float32, not 18",
        ),
        ("attention-sdpa-efficient", FLAT, "runs on cuda only, not on cpu"),
        ("attention-sdpa-math", FLAT.with_(head_dim_v=32), None),
    ],
)
def test_reasons(provider, workload, reason):
    said = get_provider(provider).supports(workload, "forward_backward")
    if reason is None:
        assert said is None
    else:
        assert reason in said


class Peer(Provider):
    name = "gdn-peer"
    operator = gdn.OPERATOR
    modes = ("forward",)


def test_missing_package_is_a_reason():
    for package in ("no_such_package", "no_such_package.ops"):
        Peer.package, Peer.install = package, "pip install no-such-package"
        assert Peer().supports(WORKLOAD) == f"the package {package} is not installed: pip install no-such-package"
    Peer.package = "torch"
    assert Peer().supports(WORKLOAD) is None


def test_missing_mode_is_a_reason():
    assert Peer().supports(WORKLOAD, "forward_backward") == "has no forward + backward: it offers forward only"


def test_failing_check_is_a_reason(monkeypatch):
    def fail(self, workload, mode):
        raise KeyError("x")

    monkeypatch.setattr(Peer, "_supports", fail)
    assert Peer().supports(WORKLOAD) == "its own check failed: KeyError: 'x'"


def test_interface_loads_no_torch():
    code = "import sys, mdnbench.baselines.workload, mdnbench.baselines.provider; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_kernels_say_what_they_cannot_take():
    provider = get_provider("mdn-triton")
    workload = Workload(64, 512, 64, dtype="bfloat16", device="cuda")
    assert "the GPU kernels take up to 256" in provider.supports(workload)
    assert provider.supports(workload.with_(head_dim_k=128)) is None
