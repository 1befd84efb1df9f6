"""What the adapters pass to the packages they wrap: checked on fakes of these packages that compute in PyTorch."""

import os
import sys

import pytest
import torch

from mdnbench.baselines import gdn
from mdnbench.baselines.inputs import make_inputs, truth_of
from mdnbench.baselines.registry import get_provider, providers
from mdnbench.baselines.workload import Workload

GROUPED = {"head_dim_k": 16, "head_dim_v": 24, "heads": 2, "value_heads": 4}
SINGLE = {"head_dim_k": 16, "head_dim_v": 24, "heads": 2}
SQUARE = {"head_dim_k": 16, "head_dim_v": 16, "heads": 2}
WIDE = {"head_dim_k": 128, "head_dim_v": 128, "heads": 2}
# Output and gradients against float64, as ||x - truth|| / ||truth||: float32 fakes leave 1e-6; 16-bit outputs and
# gradients are rounded (2e-3 in bfloat16); FlashKDA's gates are too, before they are used (measured: 3e-3).
CASES = [
    ("gdn-fla", GROUPED, "float32", 1e-5),
    ("gdn-flashqla", WIDE | {"value_heads": 4}, "bfloat16", 5e-3),
    ("kda-fla", GROUPED, "float32", 1e-5),
    ("kda-flashkda", WIDE, "bfloat16", 5e-3),
    ("mamba2-ssd", GROUPED, "float32", 1e-5),
    ("mdn-fla", SINGLE, "float16", 1e-3),
    ("attention-flash2", SQUARE, "float32", 1e-5),
    ("attention-flash3", SINGLE, "float32", 1e-5),
    ("attention-flash4", SINGLE, "float32", 1e-5),
]
MISSING = {
    "gdn-fla": "pip install fla-core==0.6.0",
    "gdn-flashqla": "pip install flash-qla",
    "kda-fla": "pip install fla-core==0.6.0",
    "kda-flashkda": "pip install --no-build-isolation git+https://github.com/MoonshotAI/FlashKDA",
    "mamba2-ssd": "MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm==2.3.2.post1 einops",
    "mdn-fla": "pip install fla-core==0.6.0",
    "mdn-authors": "clone https://github.com/HuuYuLong/MomentumDeltaNet and set MDNBENCH_AUTHORS_PATH to it",
    "attention-flash2": "pip install --no-build-isolation flash-attn",
    "attention-flash3": "./hopper, in a clone of https://github.com/Dao-AILab/flash-attention",
    "attention-flash4": "pip install --pre flash-attn-4",
}


def errors(name, shape, dtype, **changes):
    """Relative errors of the output and, where the provider has a backward, of the gradients."""
    provider = get_provider(name)
    chunk_size = None if provider.chunk_sizes is None else provider.chunk_sizes[-1]
    workload = Workload(seq_len=20, batch=2, chunk_size=chunk_size, dtype=dtype, **shape).with_(**changes)
    inputs, d_output = make_inputs(provider.operator, workload, seed=0)
    truth, true_gradients = truth_of(provider.operator, workload, inputs, d_output)
    output = provider.build(workload, inputs)()
    assert output.dtype == getattr(torch, dtype)
    found = {"o": (output, truth)}
    if "forward_backward" in provider.modes:
        gradients = torch.autograd.grad(output, list(inputs.values()), d_output)
        found |= {f"d{n}": (g, true_gradients[n]) for n, g in zip(inputs, gradients)}
    return {n: float((x.detach().double() - true).norm() / true.norm()) for n, (x, true) in found.items()}


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize(("name", "shape", "dtype", "tolerance"), CASES, ids=[case[0] for case in CASES])
def test_adapter_computes_its_operator(name, shape, dtype, tolerance):
    found = errors(name, shape, dtype)
    assert max(found.values()) < tolerance, found
    for backend in ("FLASH_QLA", "FLASH_KDA", "TILELANG"):  # fla's own kernels, or no fla at all
        assert os.environ[f"FLA_{backend}"] == ("0" if name.endswith("-fla") else "1")


@pytest.mark.usefixtures("peers")
def test_mamba2_with_one_group_for_all_heads():
    found = errors("mamba2-ssd", GROUPED | {"heads": 1}, "float32")
    assert max(found.values()) < 1e-5, found


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("gates", ["beta=1", "beta=0", "alpha=1"])
def test_flashkda_gates_at_the_ends_of_their_range(gates):
    provider, workload = get_provider("kda-flashkda"), Workload(20, **WIDE, dtype="bfloat16", gates=gates)
    inputs, d_output = make_inputs(provider.operator, workload, seed=0)
    truth, _ = truth_of(provider.operator, workload, inputs, d_output)
    output = provider.build(workload, inputs)()
    assert float((output.double() - truth).norm()) < 5e-3 * float(truth.norm()) + 1e-3


@pytest.mark.usefixtures("peers")
def test_flashkda_takes_no_decay_beyond_its_range():
    provider, workload = get_provider("kda-flashkda"), Workload(20, **WIDE, chunk_size=None, dtype="bfloat16")
    on_gpu = workload.with_(device="cuda")
    assert provider.supports(on_gpu) is None
    for gates in ("log_alpha=-5", "reset=-20", "reset=-inf", "layer"):  # channels decay at up to 1.5 times log_alpha
        assert "takes log_alpha from -5 to 0 only" in provider.supports(on_gpu.with_(gates=gates))
    assert "forward only" in provider.supports(on_gpu, "forward_backward")
    inputs, _ = make_inputs(provider.operator, workload.with_(gates="log_alpha=-5"), seed=0)
    with pytest.raises(ValueError, match="log_alpha has values below -5"):
        provider.build(workload, inputs)


@pytest.mark.usefixtures("peers")
def test_refusal_of_fla_is_lifted_and_noted():
    provider = get_provider("gdn-fla")
    workload = Workload(20, **GROUPED)
    errors("gdn-fla", GROUPED, "float32")  # the fake raises in backward, as fla does, unless it is made to run
    (note,) = provider.notes(workload, "forward_backward")
    assert gdn.FLA_ISSUE in note
    assert provider.notes(workload, "forward") == ()
    sys.modules["fla.utils"].TRITON_ABOVE_3_7_1 = True
    assert provider.notes(workload, "backward") == ()


def test_authors_code_is_loaded_past_what_it_cannot_import(authors_checkout):
    found = errors("mdn-authors", SINGLE, "float16")
    assert max(found.values()) < 1e-3, found
    assert sys.modules["fla"].__spec__.origin.startswith(str(authors_checkout))
    assert not get_provider("mdn-authors").shares_process
    errors("mdn-authors", SINGLE, "float16")  # once more in the same process


def test_authors_code_keeps_away_from_another_fla(authors_checkout, peers):
    errors("gdn-fla", GROUPED, "float32")
    with pytest.raises(RuntimeError, match="another package called fla is loaded in this process"):
        errors("mdn-authors", SINGLE, "float16")


def test_authors_checkout_is_looked_at(authors_checkout, monkeypatch):
    provider, workload = get_provider("mdn-authors"), Workload(20, **SINGLE, dtype="bfloat16", device="cuda")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "3.8.0")
    assert provider.supports(workload) is None
    monkeypatch.setattr("importlib.metadata.version", lambda package: "3.9.0")
    assert "which Triton 3.9.0 no longer has" in provider.supports(workload)
    monkeypatch.setenv("MDNBENCH_AUTHORS_PATH", str(authors_checkout / "flash-linear-attention"))
    assert "is no checkout of https://github.com/HuuYuLong/MomentumDeltaNet" in provider.supports(workload)


def test_every_missing_package_has_its_install_line(no_peers_loaded, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delenv("MDNBENCH_AUTHORS_PATH", raising=False)
    workload = Workload(20, **WIDE, dtype="bfloat16", device="cpu")
    for name, line in MISSING.items():
        assert providers()[name].supports(workload).endswith(line)


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize(
    ("name", "changes", "mode", "reason"),
    [
        ("gdn-fla", {"chunk_size": 128}, "forward", "takes chunk sizes 16, 32, 64 only, not 128"),
        ("gdn-fla", {"head_dim_k": 512}, "forward", "takes head_dim_k up to 256 only, not 512"),
        ("gdn-fla", {"device": "cpu"}, "forward", "runs on cuda only, not on cpu"),
        ("gdn-flashqla", {"head_dim_v": 256}, "forward", "takes head dimensions K 128 V 128 only, not K 128 V 256"),
        ("gdn-flashqla", {"dtype": "float32"}, "forward", "takes float16, bfloat16 only, not float32"),
        ("kda-fla", {"chunk_size": 16}, "forward", "takes chunk sizes 32, 64 only, not 16"),
        ("kda-flashkda", {"value_heads": 8}, "forward", "needs as many value heads as query heads, not 8 for 4"),
        ("mamba2-ssd", {"chunk_size": 32}, "forward", "takes chunk sizes 64, 128, 256 only, not 32"),
        ("mdn-fla", {"value_heads": 8}, "forward", "needs as many value heads as query heads, not 8 for 4"),
        ("attention-flash2", {"head_dim_v": 64}, "forward", "needs head_dim_v equal to head_dim_k, not 64 beside 128"),
        ("attention-flash3", {"head_dim_v": 256}, "forward", "not K 128 V 256"),
        ("attention-flash3", {"head_dim_k": 192}, "forward", None),
        ("attention-flash4", {"head_dim_v": 512}, "forward", "takes head dimensions up to 256 only, not 512"),
        ("attention-flash4", {"head_dim_k": 20}, "forward", "multiples of 8 in bfloat16, not 20"),
    ],
)
def test_conditions(name, changes, mode, reason):
    workload = Workload(64, 128, 128, dtype="bfloat16", device="cuda").with_(**changes)
    said = get_provider(name).supports(workload, mode)
    assert said is None if reason is None else reason in said


@pytest.mark.usefixtures("peers")
def test_asking_imports_no_package():
    workload = Workload(64, 128, 128, dtype="bfloat16", device="cuda")
    said = {name: get_provider(name).supports(workload, "forward") for name in MISSING if name != "mdn-authors"}
    assert said == dict.fromkeys(said), said
    assert not {"fla", "flash_qla", "flash_kda", "mamba_ssm", "flash_attn", "flash_attn_interface"} & set(sys.modules)
