import builtins
import sys
from pathlib import Path

import pytest
import torch

PEERS = {  # the modules of `peers`, with what they hold
    "fla/__init__.py": "",
    "fla/utils.py": "IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1 = True, True, False",
    "fla/ops/__init__.py": "",
    "fla/ops/common/__init__.py": "",
    "fla/ops/common/chunk_o.py": "from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1",
    "fla/ops/gated_delta_rule.py": "from fake_peers import fla_gated_delta_rule as chunk_gated_delta_rule",
    "fla/ops/kda.py": "from fake_peers import fla_kda as chunk_kda",
    "fla/ops/momentum_delta_rule.py": "from fake_peers import fla_momentum_delta_rule as chunk_momentum_delta_rule",
    "flash_qla.py": "from fake_peers import flashqla_gated_delta_rule as chunk_gated_delta_rule",
    "flash_kda.py": "from fake_peers import flashkda_fwd as fwd",
    "mamba_ssm/__init__.py": "import selective_scan_cuda",  # as a build without CUDA, where there is none
    "mamba_ssm/ops/triton/ssd_combined.py": "from fake_peers import mamba_chunk_scan_combined",
    "flash_attn/flash_attn_interface.py": "from fake_peers import flash_attn_func",
    "flash_attn/cute/__init__.py": "from fake_peers import flash_attn_func_with_lse as flash_attn_func",
    "flash_attn_interface.py": "from fake_peers import flash_attn_func",
}
AUTHORS = "flash-linear-attention/fla"
AUTHORS_CHECKOUT = {
    f"{AUTHORS}/__init__.py": "import transformers_of_some_version",
    f"{AUTHORS}/utils.py": "autotune_cache_kwargs = {'cache_results': FLA_CACHE_RESULTS}",
    f"{AUTHORS}/ops/__init__.py": "import a_package_that_nobody_has",
    f"{AUTHORS}/modules/__init__.py": "import a_package_that_nobody_has",
    f"{AUTHORS}/modules/l2norm.py": "",
    f"{AUTHORS}/ops/momentum_delta_rule/__init__.py": (
        "import fla.utils, fla.modules.l2norm\nfrom fake_peers import momentum_delta_rule as chunk_mode_rule"
    ),
}


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The tensors here are tiny: a second thread only waits, and on a busy machine it waits for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_modules(folder: Path, modules: dict[str, str]) -> None:
    for name, source in modules.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")


@pytest.fixture
def no_peers_loaded(monkeypatch):
    """A process that has imported none of the packages; afterwards as it was before."""
    tops = {name.split("/")[0].removesuffix(".py") for name in PEERS} | {"fake_peers"}
    for name in [name for name in sys.modules if name.split(".")[0] in tops]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    for name in ("FLA_FLASH_QLA", "FLA_FLASH_KDA", "FLA_TILELANG"):
        monkeypatch.setenv(name, "1")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in tops]:
        del sys.modules[name]
    vars(builtins).pop("FLA_CACHE_RESULTS", None)


@pytest.fixture
def peers(tmp_path, monkeypatch, no_peers_loaded):
    """Every package that an adapter wraps is installed, in the form of fake_peers.py."""
    write_modules(tmp_path / "peers", PEERS)
    monkeypatch.syspath_prepend(tmp_path / "peers")


@pytest.fixture
def authors_checkout(tmp_path, monkeypatch, no_peers_loaded):
    """A checkout of the authors' code, whose package and subpackages cannot be imported as they are."""
    write_modules(tmp_path / "authors", AUTHORS_CHECKOUT)
    monkeypatch.setenv("MDNBENCH_AUTHORS_PATH", str(tmp_path / "authors"))
    return tmp_path / "authors"
