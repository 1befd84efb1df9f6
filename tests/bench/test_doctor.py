"""The rules of the doctor, on faked environments."""

from __future__ import annotations

from typing import Any

import pytest

from mdnbench.bench import environment
from mdnbench.bench.doctor import RULES, diagnose, facts, number

H200 = {
    "name": "NVIDIA H200",
    "compute_capability": "9.0",
    "memory_bytes": 150 * 2**30,
    "driver": "580.65",
    "driver_cuda": "13.0",
}


def healthy(**changes: Any) -> dict[str, Any]:
    """A machine with an H200 and no fault, changed."""
    return {
        "os": "Linux 6.8 x86_64",
        "cpu": {"model": "CPU", "cores": 8, "threads": 16, "usable_threads": 16},
        "gpu": H200,
        "nvidia_hardware": True,
        "python": "3.12.1",
        "torch": "2.13.0+cu130",
        "torch_cuda": "13.0",
        "torch_sees_cuda": True,
        "torch_error": None,
        "triton": "3.9.0",
        "triton_interpret": False,
        "ptxas": {"version": "13.4.59", "bundled": True, "arch": 90},
        "numpy": "2.4.0",
        "packages": {"fla-core": "0.6.0"},
        "mdnbench": "0.1.0",
    } | changes


def ptxas(version: str) -> dict[str, Any]:
    return {"version": version, "bundled": False, "arch": 90}


A100 = H200 | {"name": "NVIDIA A100", "compute_capability": "8.0"}
CPU_ONLY = {"gpu": None, "nvidia_hardware": False, "torch": "2.13.0+cpu", "torch_cuda": None, "torch_sees_cuda": False}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"triton": "3.6.0", "ptxas": ptxas("12.8.93")}, ["hopper-ptxas", "hopper-triton", "interpreter-numpy"]),
        ({"triton": "3.7.1", "ptxas": ptxas("12.8.93")}, ["hopper-ptxas"]),
        ({"triton": "3.8.0", "ptxas": ptxas("12.9.86")}, ["hopper-ptxas"]),
        ({"triton": "3.7.0", "ptxas": ptxas("13.0.48")}, ["hopper-ptxas-13", "hopper-triton"]),
        ({"triton": "3.4.0", "ptxas": ptxas("13.3.1")}, ["hopper-triton"]),
        ({"triton": "3.3.1", "ptxas": ptxas("13.3.1")}, []),
        ({"triton": "3.6.0", "ptxas": ptxas("12.8.93"), "gpu": A100, "numpy": "2.3.9"}, []),
        ({"ptxas": None}, []),
        ({"triton": "3.2.0"}, ["triton-old"]),
        ({"triton": None, "ptxas": None}, ["triton-missing"]),
        ({"torch": "2.5.1+cu124"}, ["torch-old"]),
        ({"torch": None, "torch_cuda": None, "torch_sees_cuda": None}, ["torch-missing"]),
        ({"torch_error": "OSError: no", "torch_cuda": None, "torch_sees_cuda": None}, ["torch-missing"]),
        ({"torch": "2.13.0+cpu", "torch_cuda": None, "torch_sees_cuda": False}, ["torch-without-cuda"]),
        ({"torch_sees_cuda": False}, ["cuda-unavailable"]),
        ({"gpu": None, "torch_sees_cuda": False}, ["driver-missing"]),
        ({"triton_interpret": True}, ["interpreter-on"]),
        ({"packages": {"fla-core": "0.5.0"}}, ["block-pointers"]),
        ({"packages": {"fla-core": "0.5.0"}, "triton": "3.7.1"}, []),
        (CPU_ONLY, ["no-gpu"]),
        (CPU_ONLY | {"torch": "2.13.0+cu130", "torch_cuda": "13.0"}, ["no-gpu"]),
    ],
)
def test_rules_find_known_bad_combinations(changes: dict[str, Any], names: list[str]) -> None:
    assert sorted(rule.name for rule in diagnose(healthy(**changes))) == sorted(names)


def test_each_rule_says_what_it_means_and_what_to_do() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.level in ("error", "warning")
        assert rule.means.endswith(".")
        assert len(rule.remedy) > 15


def test_errors_come_first() -> None:
    found = diagnose(healthy(triton="3.6.0", ptxas=ptxas("12.8.93"), triton_interpret=True))
    assert [rule.level for rule in found] == sorted(rule.level for rule in found)


def test_versions_compare_as_numbers() -> None:
    assert number("3.10.0") > number("3.9.1+git123") > number("3.9")
    assert number(None) == ()


def test_facts_name_what_is_missing() -> None:
    rows = dict(facts(healthy(gpu=None, triton=None, ptxas=None)))
    assert rows["GPU"] == rows["driver"] == rows["triton"] == rows["ptxas"] == "none"
    assert dict(facts(healthy()))["GPU"] == "NVIDIA H200, 150 GiB, sm 9.0"
    assert dict(facts(healthy()))["torch"] == "2.13.0+cu130 (CUDA 13.0)"


def test_this_machine_can_be_diagnosed() -> None:
    here = environment.collect()
    diagnose(here)
    assert all(isinstance(value, str) for _, value in facts(here))
