"""Providers of other packages: found by entry point, and unable to harm the others when broken."""

import sys
import textwrap

import pytest

from mdnbench.baselines.registry import OPERATORS, get_provider, operators, providers
from mdnbench.baselines.workload import Workload

OURS = [
    "mdn-torch",
    "mdn-triton",
    "mdn-fla",
    "mdn-authors",
    "gdn-torch",
    "gdn-fla",
    "gdn-flashqla",
    "kda-torch",
    "kda-fla",
    "kda-flashkda",
    "mamba2-torch",
    "mamba2-ssd",
    "attention-sdpa-flash",
    "attention-sdpa-cudnn",
    "attention-sdpa-efficient",
    "attention-sdpa-math",
    "attention-flash2",
    "attention-flash3",
    "attention-flash4",
]
WORKLOAD = Workload(seq_len=16, head_dim_k=8, head_dim_v=8, heads=1, chunk_size=16)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution `peer-kernels` with a module `peer_kernels` and entry points."""

    def run(module: str, entry_points: dict[str, str]) -> None:
        (tmp_path / "peer_kernels.py").write_text(textwrap.dedent(module))
        info = tmp_path / "peer_kernels-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peer-kernels\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[mdnbench.providers]", *lines, ""]))
        monkeypatch.syspath_prepend(tmp_path)

    yield run
    sys.modules.pop("peer_kernels", None)


def test_ours_are_there():
    assert list(providers())[: len(OURS)] == OURS
    assert [provider.name for provider in providers().values()] == list(providers())
    assert operators()[: len(OPERATORS)] == OPERATORS
    assert get_provider("kda-torch").operator.title == "Kimi Delta Attention"


def test_unknown_provider_names_the_near_ones():
    with pytest.raises(ValueError, match=r"provider='gdn-toch' is unknown: choose gdn-torch"):
        get_provider("gdn-toch")


def test_provider_and_operator_of_another_package(install):
    install(
        """
        from mdnbench.baselines import gdn
        from mdnbench.baselines.provider import Operator, Provider

        def truth(workload, inputs):
            return inputs["v"]

        COPY = Operator("copy", "Copy", (), lambda workload, inputs: {"v": inputs["v"]}, truth)

        class CopyPeer(Provider):
            name = "copy-peer"
            operator = COPY

            def build(self, workload, inputs):
                return lambda: inputs["v"] * 1

        class GdnPeer(gdn.GdnTorch):
            name = "gdn-peer"
        """,
        {"copy": "peer_kernels:CopyPeer", "gdn": "peer_kernels:GdnPeer"},
    )
    assert [name for name in providers() if name not in OURS] == ["copy-peer", "gdn-peer"]
    assert get_provider("copy-peer").supports(WORKLOAD) is None
    assert [operator.name for operator in operators()][len(OPERATORS) :] == ["copy"]


def test_broken_entry_points_say_why_and_hurt_no_other(install):
    install(
        """
        from mdnbench.baselines.gdn import GdnTorch
        from mdnbench.baselines.provider import Operator, Provider

        class Good(GdnTorch):
            name = "gdn-good"

        class Nameless(Provider):
            pass

        class OtherGdn(GdnTorch):
            name = "gdn-other"
            operator = Operator("gdn", "Another", (), lambda w, i: i, lambda w, i: i["v"])

        class OneDevice(GdnTorch):
            name = "gdn-one"
            devices = "cpu"

        class OtherMode(GdnTorch):
            name = "gdn-mode"
            modes = ("forwards",)

        class NoSizes(GdnTorch):
            name = "gdn-sizes"
            chunk_sizes = ()

        class Raising(GdnTorch):
            def __init__(self):
                raise RuntimeError("no licence")
        """,
        {
            "missing": "peer_kernels:NoSuchClass",
            "missing-module": "no_such_module:Provider",
            "nameless": "peer_kernels:Nameless",
            "taken": "mdnbench.baselines.gdn:GdnTorch",
            "kda-torch": "builtins:dict",
            "other-gdn": "peer_kernels:OtherGdn",
            "raising": "peer_kernels:Raising",
            "one-device": "peer_kernels:OneDevice",
            "other-mode": "peer_kernels:OtherMode",
            "no-sizes": "peer_kernels:NoSizes",
            "good": "peer_kernels:Good",
        },
    )
    found = providers()
    assert list(found)[: len(OURS)] == OURS
    assert found["gdn-good"].supports(WORKLOAD) is None
    assert found["kda-torch"].supports(WORKLOAD) is None
    reasons = {name: p.supports(WORKLOAD) for name, p in found.items() if name not in [*OURS, "gdn-good"]}
    expected = {
        "missing": "NoSuchClass",
        "missing-module": "ModuleNotFoundError: No module named 'no_such_module'",
        "nameless": "Nameless has no attribute name",
        "taken": "the provider name 'gdn-torch' is taken",
        "kda-torch (peer-kernels)": "which is no mdnbench.baselines.provider.Provider",
        "other-gdn": "the operator name 'gdn' is taken",
        "raising": "RuntimeError: no licence",
        "one-device": "devices='cpu' must be a tuple of cpu, cuda, or of some of them",
        "other-mode": "modes=('forwards',) must be a tuple of forward, backward, forward_backward",
        "no-sizes": "chunk_sizes=() must be a tuple of whole numbers, or None",
    }
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name]
        assert "of peer-kernels" in reasons[name]
    assert [operator.name for operator in operators()] == [operator.name for operator in OPERATORS]
