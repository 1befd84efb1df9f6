"""Which configuration a shape gets, and what the code that the compiler makes of it needs."""

import pytest
from kernel_cases import compile_launches

from mdnbench.kernels.config import (
    STATE_SLICE,
    KernelConfig,
    backward_shared_memory,
    block_size,
    choose_backward_config,
    choose_config,
    scan_shared_memory,
)
from mdnbench.kernels.pairs import SLICE

H200 = (232448, 132)  # shared memory a program may use in bytes, multiprocessors
A100 = (166912, 108)
L40S = (101376, 142)


@pytest.mark.parametrize(
    ("K", "V", "chunk_size", "element_bytes", "heads", "free_p", "limits", "expected"),
    [
        (128, 128, 64, 2, 64, False, H200, KernelConfig(32, 4, 2, 4, 168)),
        (128, 128, 64, 2, 16, False, H200, KernelConfig(16, 4, 2, 4, 168)),  # few heads: narrower tiles
        (128, 256, 64, 2, 48, False, H200, KernelConfig(32, 4, 2, 4, 168)),
        (64, 64, 64, 2, 128, False, H200, KernelConfig(32, 4, 2, 4, 168)),
        (256, 512, 64, 2, 24, False, H200, KernelConfig(64, 8, 2, 4, 168)),  # wide tiles for K above 128
        (256, 512, 64, 2, 6, False, H200, KernelConfig(32, 4, 2, 4, 168)),
        (256, 96, 64, 2, 40, False, H200, KernelConfig(32, 4, 2, 4, 168)),  # 120 narrow programs, 132 multiprocessors
        (256, 512, 32, 2, 24, False, H200, KernelConfig(32, 4, 2, 4, None)),
        (200, 32, 64, 2, 256, False, H200, KernelConfig(32, 4, 2, 4, 168)),
        (100, 33, 64, 2, 256, False, H200, KernelConfig(32, 4, 2, 4, 168)),  # as 128 and 64
        (16, 16, 16, 2, 256, False, H200, KernelConfig(16, 4, 2, 4, None)),
        (128, 128, 128, 2, 64, False, H200, KernelConfig(32, 8, 1, 8, None)),
        (128, 128, 64, 4, 64, False, H200, KernelConfig(32, 4, 1, 4, None)),
        # where shared memory does not hold the stages that the shape would have, fewer
        (128, 128, 64, 2, 64, True, A100, KernelConfig(32, 4, 2, 4, 168)),
        (128, 128, 64, 2, 64, False, L40S, KernelConfig(32, 4, 1, 4, 168)),
        (256, 512, 64, 2, 24, True, H200, KernelConfig(64, 8, 1, 4, 168)),
        (256, 512, 64, 2, 24, False, L40S, KernelConfig(16, 4, 1, 4, 168)),  # and no 8 warps where tiles are narrow
    ],
)
def test_table(K, V, chunk_size, element_bytes, heads, free_p, limits, expected):
    config = choose_config(K, V, chunk_size, element_bytes, heads, free_p, *limits)
    assert config == expected
    assert scan_shared_memory(config, block_size(K), chunk_size, element_bytes, free_p) <= limits[0]


@pytest.mark.parametrize(
    ("K", "chunk_size", "element_bytes", "limits"),
    [(256, 128, 2, L40S), (128, 128, 4, L40S), (256, 128, 4, H200), (64, 128, 4, A100)],
)
def test_chunks_that_do_not_fit(K, chunk_size, element_bytes, limits):
    message = (
        rf"^chunk_size={chunk_size} with K={K} and {element_bytes} bytes an element needs more shared memory than the "
        rf"{limits[0]} bytes of this GPU: use a smaller chunk_size$"
    )
    with pytest.raises(ValueError, match=message):
        choose_config(K, 128, chunk_size, element_bytes, 64, False, *limits)


@pytest.mark.parametrize(
    ("choose", "limits", "refused"),
    [
        (choose_config, H200, ()),
        (choose_backward_config, H200, ()),
        (choose_config, A100, ()),
        (choose_backward_config, A100, (True,)),
        (choose_config, L40S, (True,)),
        (choose_backward_config, L40S, (False, True)),
    ],
    ids=["H200", "H200 backward", "A100", "A100 backward", "L40S", "L40S backward"],
)
def test_every_size_has_a_configuration(choose, limits, refused):
    """At the default chunk size and in bfloat16, whatever else; on smaller GPUs K above 128 not with every free_p."""
    for K in (16, 20, 64, 100, 128, 200, 256):
        for V in (16, 24, 64, 100, 512):
            for heads in (1, 16, 1024):
                for free_p in (False, True):
                    if K > 128 and free_p in refused:
                        with pytest.raises(ValueError, match="use a smaller chunk_size"):
                            choose(K, V, 64, 2, heads, free_p, *limits)
                    else:
                        choose(K, V, 64, 2, heads, free_p, *limits)


def test_slices_are_those_of_the_kernels():
    assert SLICE.value == STATE_SLICE


SIZES = {"form": "chunk", "dtype": "bfloat16", "T": 4096}
H16D128 = {**SIZES, "B": 4, "H": 16, "HV": 16, "K": 128, "V": 128}
D64 = {**SIZES, "B": 4, "H": 32, "HV": 32, "K": 64, "V": 64}
PAPER_1_3B = {**SIZES, "B": 4, "H": 6, "HV": 6, "K": 256, "V": 512}
SHIPPED = {
    "h16d128": H16D128,
    "h16d128, no states": {**H16D128, "states": False},
    "h16d128, few heads": {**H16D128, "B": 1},
    "h16d128, free p, packed": {**H16D128, "free_p": True, "packed": True},
    "d64": D64,
    "d64, few heads": {**D64, "B": 1, "H": 16, "HV": 16},
    "paper-400m": {**SIZES, "B": 8, "H": 6, "HV": 6, "K": 128, "V": 256},
    "paper-1.3b": PAPER_1_3B,
    "paper-1.3b, no states": {**PAPER_1_3B, "states": False},
    "on an A100": {**H16D128, "capability": 80},
    "paper-1.3b on an L40S": {**PAPER_1_3B, "capability": 89},
    "float32": {**SIZES, "dtype": "float32", "chunk_size": 32, "B": 4, "H": 4, "HV": 4, "K": 64, "V": 64},
}
# Bytes of stack (spills) a thread of the gates, prepare and scan kernels: the most that Triton 3.7.1 with its ptxas
# 12.8.93 needs for the cases of that name, and 16 more, or 0. Prepare spills since its registers are limited; the scans
# around their loops, where they read and write states: at K = 256 no more than 34 instructions of a loop do.
STACK_BYTES = {
    "sm_90": (0, 152, 80),
    "paper-1.3b": (0, 152, 296),
    "on an A100": (0, 968, 304),
    "paper-1.3b on an L40S": (0, 2344, 384),
    "float32": (0, 416, 96),
}


def test_shipped_configurations_compile():
    """For GPUs that are not here: no more spills than are known, in the shared memory that is reckoned with."""
    launches = iter(compile_launches(list(SHIPPED.values())))
    for name, case in SHIPPED.items():
        used = [next(launches) for _ in range(3)]
        assert [usage["kernel"] for usage in used] == ["gates_fwd_kernel", "prepare_fwd_kernel", "scan_fwd_kernel"]
        for usage, limit in zip(used, STACK_BYTES.get(name, STACK_BYTES["sm_90"]), strict=True):
            assert usage["stack_bytes"] <= limit, (name, usage)
        limits = {80: A100, 89: L40S, 90: H200}[case.get("capability", 90)]
        element_bytes = 4 if name == "float32" else 2
        chunk_size, free_p = case.get("chunk_size", 64), case.get("free_p", False)
        config = choose_config(case["K"], case["V"], chunk_size, element_bytes, case["B"] * case["HV"], free_p, *limits)
        estimate = scan_shared_memory(config, block_size(case["K"]), chunk_size, element_bytes, free_p)
        assert used[2]["shared_bytes"] <= estimate <= limits[0], name
        assert used[1]["shared_bytes"] <= L40S[0], name  # prepare has one configuration for all GPUs
    assert next(launches, None) is None


BACKWARD = {
    name: {**case, "form": "backward", "states": True}
    for name, case in {**SHIPPED, "grouped": {**H16D128, "H": 4}, "chunks of 16": {**H16D128, "chunk_size": 16}}.items()
    if "no states" not in name and "capability" not in case and name not in ("d64, few heads", "paper-400m")
}
# Stack as above, in the order of the launches: prepare (attention alone), scan, matrices, states, gradients, gates.
BACKWARD_KERNELS = ("prepare_fwd", "scan_bwd", "matrices_bwd", "states_bwd", "gradients_bwd", "gates_bwd")
BACKWARD_STACK_BYTES = {
    "sm_90": (0, 48, 160, 0, 104, 48),
    "grouped": (0, 48, 400, 0, 256, 48),
    "float32": (200, 0, 1872, 0, 136, 0),
    "h16d128, few heads": (0, 136, 160, 0, 104, 48),
    "h16d128, free p, packed": (0, 88, 144, 0, 376, 0),
    "paper-1.3b": (0, 312, 720, 0, 120, 56),
}


def test_shipped_backward_configurations_compile():
    launches = iter(compile_launches(list(BACKWARD.values())))
    for name, case in BACKWARD.items():
        used = [next(launches) for _ in BACKWARD_KERNELS]
        assert [usage["kernel"].removesuffix("_kernel") for usage in used] == list(BACKWARD_KERNELS)
        for usage, limit in zip(used, BACKWARD_STACK_BYTES.get(name, BACKWARD_STACK_BYTES["sm_90"]), strict=True):
            assert usage["stack_bytes"] <= limit, (name, usage)
        element_bytes, chunk_size = 4 if name == "float32" else 2, case.get("chunk_size", 64)
        free_p = case.get("free_p", False)
        shape = (case["K"], case["V"], chunk_size, element_bytes, case["B"] * case["HV"], free_p)
        config = choose_backward_config(*shape, *H200)
        estimates = backward_shared_memory(config, block_size(case["K"]), chunk_size, element_bytes, free_p)
        for usage, kernel in zip(used[1:], estimates):
            assert usage["shared_bytes"] <= estimates[kernel] <= H200[0], (name, kernel)
    assert next(launches, None) is None


def test_what_no_configuration_fits():
    for choose in (choose_config, choose_backward_config):
        with pytest.raises(ValueError, match="q has head dimension 512: the GPU kernels take up to 256"):
            choose(512, 64, 64, 2, 64, False, *H200)
    with pytest.raises(ValueError, match="needs more shared memory in the backward pass than the 101376 bytes of this"):
        choose_backward_config(256, 128, 64, 4, 64, False, *L40S)
    with pytest.raises(ValueError, match="chunk_size=64 with K=128 and 4 bytes an element needs more shared memory"):
        choose_config(128, 128, 64, 4, 64, True, *L40S)  # the scan would fit, the prepare kernel does not
