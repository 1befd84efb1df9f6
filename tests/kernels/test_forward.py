"""The chunk kernels against the operator in float64: interpreted on the CPU, and as they are on a GPU."""

import time

import pytest
import torch
from kernel_cases import (
    DEVICE,
    FEATURES,
    REAL,
    SMALL,
    TOKEN_TENSORS,
    awkward,
    by_name,
    case_of,
    check,
    exact,
    gpu,
    inputs_of,
    options_of,
    poisoned,
)

from mdnbench.kernels import chunk_momentum_delta_rule
from mdnbench.kernels.config import KernelConfig
from mdnbench.kernels.forward import chunk_forward
from mdnbench.kernels.reference import chunk_mdn, recurrent_mdn

# In the interpreter NumPy sees what the kernels mask afterwards: decays of the future, above the diagonal.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
forward = by_name(lambda *arguments: chunk_forward(*arguments)[:2], chunk_size=32, config=None)
FP32_ERROR = 5e-6 if DEVICE == "cpu" else 2e-5  # on a GPU products are of three TF32 products each


def recurrence(chunk_size=None, config=None, **arguments):
    return recurrent_mdn(**arguments)


def check_forward(inputs, options, error, function=forward, truth=recurrence):
    check(poisoned(function, **inputs, **options), inputs, options, error, error, truth)


DTYPES = [pytest.param(torch.float32, FP32_ERROR, id="fp32"), pytest.param(torch.float16, 8e-4, id="fp16")]


@pytest.mark.parametrize(("dtype", "error"), DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, dtype, error, make_inputs):
    check_forward(*case_of(feature, dtype, make_inputs), error)


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
@pytest.mark.parametrize("T", [1, 15, 64, 70, 130])
def test_lengths(T, chunk_size, make_inputs):
    dtype, error = DTYPES[T == 130].values
    inputs = inputs_of(make_inputs, "layer", dtype, {**SMALL, "T": T})
    check_forward(inputs, options_of({"chunk_size": chunk_size}), error)


@pytest.mark.parametrize(("T", "chunk_size"), [(40, 16), (130, 64), (257, 128)])
def test_gate_profiles(profile, T, chunk_size, make_inputs):
    """Several chunks each. Strong decays over long chunks are where sums of log gates lose digits."""
    inputs = inputs_of(make_inputs, profile, torch.float32, {**SMALL, "T": T})
    check_forward(inputs, options_of({"chunk_size": chunk_size}), FP32_ERROR)


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.float16, 1e-2)], ids=["fp32", "fp16"])
def test_equal_keys(dtype, error, chunk_size, make_inputs):
    """With eta = 2 and no decay a step is a reflection, and powers of L are huge where its inverse has entries of 2.

    Nothing is forgotten either: the rounding of every chunk is in the result, hence wider limits.
    """
    inputs = inputs_of(make_inputs, "mu_zero", dtype, {**SMALL, "T": 2 * chunk_size}, ("p", "beta"))
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["log_alpha"] = torch.zeros_like(inputs["log_alpha"])
    inputs["eta"] = torch.full_like(inputs["eta"], 2.0)
    check_forward(inputs, options_of({"chunk_size": chunk_size}), error)


CONFIGS = [
    KernelConfig(block_v=16, scan_warps=4, scan_stages=1),
    KernelConfig(block_v=32, scan_warps=4, scan_stages=2, prepare_warps=8),
    KernelConfig(block_v=64, scan_warps=8, scan_stages=1, prepare_max_registers=168),
    None,
]


@pytest.mark.skipif(DEVICE == "cuda", reason="a configuration that did not run by itself may end the process")
@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_give_the_same(config, make_inputs):
    inputs = inputs_of(make_inputs, "mild", torch.float32, {**SMALL, "V": 70})
    check_forward(inputs, options_of({"config": config}), FP32_ERROR)


def test_strides_and_dtypes(make_inputs):
    """Head-major tensors, gates out of one projection, in float16 or float64, a float16 state, bounds out of a list."""
    inputs = inputs_of(make_inputs, "layer", torch.float16, {**SMALL, "T": 70, "H": 2, "HV": 4, "N": 3})
    inputs = awkward(inputs)
    bounds = torch.tensor([0, 9, 33, 9, 33, 9, 70], dtype=torch.int32, device=DEVICE)[::2]
    check_forward(inputs, {"output_final_state": True, "cu_seqlens": bounds}, 8e-4)


@pytest.mark.parametrize("gate", ["log_alpha", "log_mu", "beta", "eta"])
def test_a_gate_that_is_nan_shows(gate, make_inputs):
    """From its token on; within its chunk, whose tokens are computed together, before it too."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL)
    inputs[gate][:, 20] = float("nan")
    o, state = forward(**inputs, **options_of({"chunk_size": 16}))
    assert o[:, :16].isfinite().all()
    assert o[:, 20:].isnan().all()
    assert state.isnan().all()


@pytest.mark.parametrize("free_p", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_spoils_its_token_alone(value, free_p, make_inputs):
    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL, () if free_p else ("p",))
    expected_o, expected_state = forward(**inputs, **options_of({}))
    inputs["q"][:, 20, :, 3] = value
    o, state = forward(**inputs, **options_of({}))
    assert o[:, 20].isnan().all()
    others = torch.arange(o.shape[1], device=DEVICE) != 20
    assert torch.equal(o[:, others], expected_o[:, others])
    assert torch.equal(state, expected_state)


def test_the_same_bits_again(make_inputs):
    inputs = inputs_of(make_inputs, "mild", torch.float32, SMALL)
    for first, second in zip(forward(**inputs, **options_of({})), forward(**inputs, **options_of({}))):
        assert torch.equal(first, second)


def check_on_gpu(inputs, options, error, function=chunk_momentum_delta_rule):
    check_forward(inputs, options, error, function, exact)


ON_GPU = [
    pytest.param(torch.bfloat16, 128, 6e-3, id="bf16"),
    pytest.param(torch.float16, 128, 1e-3, id="fp16"),
    pytest.param(torch.float32, 64, 2e-5, id="fp32"),  # at 128 the assembler takes minutes
]
H16D128 = {**REAL["h16d128"], "B": 1, "T": 257}
# Without decay the recurrence diverges (log_mu = 0: outputs of 3e5 at 257 tokens) or forgets nothing (log_alpha = 0):
# the rounding of the state to bfloat16, at the start of every chunk, adds up.
PROFILE_ERROR = {"mu_one": 2e-2, "alpha_one": 1e-2}


class TestOnGpu:
    """The public function, at real sizes."""

    pytestmark = gpu

    @pytest.mark.parametrize(("dtype", "size", "error"), ON_GPU)
    @pytest.mark.parametrize("feature", FEATURES)
    def test_features(self, feature, dtype, size, error, make_inputs):
        check_on_gpu(*case_of(feature, dtype, make_inputs, T=257, K=size, V=size), error)

    @pytest.mark.parametrize("tokens", [1, 65, 1000])
    @pytest.mark.parametrize("shape", REAL)
    def test_shapes(self, shape, tokens, make_inputs):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**REAL[shape], "T": tokens})
        check_on_gpu(inputs, options_of({}), 6e-3)

    @pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
    @pytest.mark.parametrize("tokens", [1, 63, 128, 777])
    def test_chunk_sizes(self, tokens, chunk_size, make_inputs):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**H16D128, "T": tokens}, ("p",))
        check_on_gpu(inputs, options_of({"chunk_size": chunk_size}), 6e-3)

    def test_float32_at_128(self, make_inputs):
        check_on_gpu(inputs_of(make_inputs, "layer", torch.float32, H16D128, ("p",)), options_of({}), 2e-5)

    @pytest.mark.parametrize("free_p", [True, False], ids=["free p", "tied p"])
    def test_gate_profiles(self, profile, free_p, make_inputs):
        inputs = inputs_of(make_inputs, profile, torch.bfloat16, H16D128, () if free_p else ("p",))
        check_on_gpu(inputs, options_of({}), PROFILE_ERROR.get(profile, 6e-3))

    @pytest.mark.parametrize("chunk_size", [64, 128])
    def test_gate_profiles_in_float32(self, profile, chunk_size, make_inputs):
        inputs = inputs_of(make_inputs, profile, torch.float32, {**H16D128, "K": 64, "V": 64})
        check_on_gpu(inputs, options_of({"chunk_size": chunk_size}), 2e-5)

    def test_a_long_sequence(self, make_inputs):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**H16D128, "T": 16384})
        check_on_gpu(inputs, options_of({}), 6e-3)

    def test_pointers_that_are_no_multiple_of_16(self, make_inputs):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, H16D128)
        for name in TOKEN_TENSORS:
            memory = torch.cat((inputs[name].flatten()[:1], inputs[name].flatten()))
            inputs[name] = memory[1:].view_as(inputs[name])
        check_on_gpu(inputs, options_of({}), 6e-3)

    def test_ten_times_the_same_bits(self, make_inputs):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**REAL["h16d128"], "T": 1000})
        first_o, first_state = chunk_momentum_delta_rule(**inputs, output_final_state=True)
        for _ in range(9):
            o, state = chunk_momentum_delta_rule(**inputs, output_final_state=True)
            assert torch.equal(o, first_o)
            assert torch.equal(state, first_state)

    @pytest.mark.parametrize(
        "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cuda", torch.float16)]
    )
    @pytest.mark.parametrize("packed", [False, True])
    def test_modes_change_no_bit(self, mode, packed, make_inputs):
        options = {"cu_seqlens": [0, 100, 257]} if packed else {}
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**H16D128, "N": 2 if packed else 1})
        expected = chunk_momentum_delta_rule(**inputs, **options_of(options))
        with mode():
            computed = chunk_momentum_delta_rule(**inputs, **options_of(options))
        for got, wanted in zip(computed, expected):
            assert torch.equal(got, wanted)

    @pytest.mark.parametrize("packed", [False, True])
    def test_graph(self, packed, make_inputs):
        """Captured once and replayed, on inputs that changed since."""
        options = options_of({"cu_seqlens": [0, 100, 257]} if packed else {})
        sizes = {**H16D128, "N": 2 if packed else 1}
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, sizes)
        chunk_momentum_delta_rule(**inputs, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            computed = chunk_momentum_delta_rule(**inputs, **options)
        for seed in (1, 2):
            for name, x in inputs_of(make_inputs, "mild", torch.bfloat16, {**sizes, "seed": seed}).items():
                inputs[name].copy_(x)
            graph.replay()
            for got, expected in zip(computed, chunk_momentum_delta_rule(**inputs, **options)):
                assert torch.equal(got, expected)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_a_device_that_is_not_the_current_one(self, make_inputs):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, H16D128, device="cuda:1")
        assert torch.cuda.current_device() == 0
        check_on_gpu(inputs, options_of({}), 6e-3)
        assert torch.cuda.current_device() == 0

    def test_gradients(self, make_inputs, evaluate, assert_close):
        inputs = inputs_of(
            make_inputs, "layer", torch.float32, {**H16D128, "K": 64, "V": 64, "H": 1, "HV": 2, "T": 130}
        )
        assert_close(evaluate(chunk_momentum_delta_rule, inputs), evaluate(chunk_mdn, inputs, torch.float64), 2e-5)

    def test_host_time(self, make_inputs):
        """Time until an eager call returns; a figure to read (-s), since a busy machine makes it any number."""
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**H16D128, "B": 1, "T": 64}, ("initial_state",))
        for _ in range(20):
            o, _ = chunk_momentum_delta_rule(**inputs)
        torch.cuda.synchronize()
        times_us = []
        for _ in range(200):
            begin = time.perf_counter()
            o, _ = chunk_momentum_delta_rule(**inputs)
            times_us.append(1e6 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
        assert o.isfinite().all()
        print(f"\nhost time of a call: median {sorted(times_us)[100]:.0f} us, fastest {min(times_us):.0f} us")

    # What has more than 2^31 numbers, and memory in GiB for it.
    @pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
    @pytest.mark.parametrize(
        ("sizes", "name", "chunk_size", "memory_gib"),
        [
            ({"T": 100, "H": 1, "HV": 32, "K": 16, "V": 512}, "v", 64, 22),
            ({"T": 100, "H": 32, "HV": 32, "K": 256, "V": 16}, "q", 64, 22),
            ({"T": 100, "H": 1, "HV": 64, "K": 16, "V": 16}, "inverse", 128, 22),
            ({"T": 1, "H": 16, "HV": 16, "K": 128, "V": 128}, "initial_state", 64, 22),
        ],
        ids=["values", "keys", "chunk matrices", "states"],
    )
    def test_more_than_2_31_numbers(self, sizes, name, chunk_size, memory_gib, packed, make_inputs):
        """Two sequences many times over; the last two come out as the two do by themselves."""
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < memory_gib * 2**30:
            pytest.skip(f"needs {memory_gib} GiB of free GPU memory")
        few = inputs_of(make_inputs, "layer", torch.bfloat16, {**sizes, "B": 2}, ("p",))
        numbers = 2 * sizes["HV"] * chunk_size**2 if name == "inverse" else few[name].numel()
        copies = 2**31 // numbers + 1
        many = {key: x.repeat(copies, *[1] * (x.ndim - 1)) for key, x in few.items() if key != "initial_state"}
        many["initial_state"] = few["initial_state"].repeat(1, copies, 1, 1, 1)
        options = {"output_final_state": True, "chunk_size": chunk_size}
        if packed:
            many = {key: x if key == "initial_state" else x.flatten(0, 1)[None] for key, x in many.items()}
            options["cu_seqlens"] = torch.arange(2 * copies + 1, device=DEVICE) * sizes["T"]
        o, state = chunk_momentum_delta_rule(**many, **options)
        o = o.view(2 * copies, sizes["T"], *o.shape[2:])
        check((o[-2:], state[:, -2:]), few, {"output_final_state": True}, 6e-3, 6e-3, exact)
        check((o[:2], state[:, :2]), few, {"output_final_state": True}, 6e-3, 6e-3, exact)
