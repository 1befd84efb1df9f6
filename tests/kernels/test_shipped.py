"""The configurations that are shipped in kernels/tuned."""

import pytest
from kernel_cases import compile_launches

from mdnbench.bench import inspection
from mdnbench.kernels import store
from mdnbench.kernels.space import CONFIGS, Shape, table_config, why_invalid

FILES = sorted(store.SHIPPED_FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_entries_are_valid_and_those_of_the_table_are_as_in_the_table(path):
    gpu, entries = store.read(path)
    assert path == store.file_of(store.SHIPPED_FOLDER, gpu.name)
    assert entries
    for entry in entries:
        key = entry.key
        shapes = [
            Shape(
                key.head_dim_k, key.head_dim_v, key.chunk_size, 4 if key.dtype == "float32" else 2, heads, key.free_p,
                gpu.shared_memory_bytes, gpu.multiprocessors,
            )
            for heads in range((1 << key.heads_bucket) // 2 + 1, (1 << key.heads_bucket) + 1)
        ]  # fmt: skip
        config = CONFIGS[key.direction](**entry.config)
        assert why_invalid(key.direction, config, shapes[-1]) is None
        if entry.source == store.HAND_CHOSEN:
            assert entry.latency_ms is None
            assert entry.versions is None
            assert config in [table_config(key.direction, shape) for shape in shapes], (
                f"{store.describe(key)}: the table of config.py has changed since: run mdnbench tune --export"
            )
        else:
            assert entry.versions is not None
            assert entry.latency_ms > 0


# Bytes of stack (spills) a thread: the most that Triton 3.7.1 with its ptxas 12.8.93 needs for a tuned entry, and 16
# more, or 0. Prepare and gradients spill since their registers are limited.
STACK_BYTES = {
    "gates_fwd": 0, "prepare_fwd": 144, "scan_fwd": 0, "scan_bwd": 0, "matrices_bwd": 168, "states_bwd": 0,
    "gradients_bwd": 104, "gates_bwd": 48,
}  # fmt: skip
STACK_BYTES_AT_K_256 = {**STACK_BYTES, "scan_fwd": 64, "scan_bwd": 48, "matrices_bwd": 712, "gates_bwd": 104}


def test_tuned_entries_compile_for_sm_90_without_more_spills_than_known():
    """Whatever version of the kernels they were found with."""
    cases = inspection.tuned_cases(90)
    read = [entry for path in FILES for entry in store.read(path)[1]]
    tuned = [entry.key.direction for entry in read if entry.source == store.TUNED]
    assert len(cases) == len(tuned) + tuned.count("forward") > 0  # forwards with gradients, and without
    found = compile_launches(cases)
    assert {launch["case"] for launch in found} == set(cases)
    for launch in found:
        case = cases[launch["case"]]
        limits = STACK_BYTES_AT_K_256 if case["K"] == 256 else STACK_BYTES
        assert launch["stack_bytes"] <= limits[launch["kernel"].removesuffix("_kernel")], launch
        config = case["config"]
        if launch["kernel"] in ("scan_fwd_kernel", "scan_bwd_kernel"):  # compiled as stored, not as the table says
            stored = {name: config[f"scan_{name}"] for name in ("max_registers", "stages", "warps")}
            used = {"max_registers": launch["max_registers"]}
            assert stored == {**used, "stages": launch["num_stages"], "warps": launch["num_warps"]}


def test_the_h200_has_entries():
    assert "NVIDIA-H200.json" in {path.name for path in FILES}
