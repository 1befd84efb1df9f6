"""The backward kernels as they are on a GPU, at real sizes, against gradients of the chunk form in float64."""

import functools

import pytest
import torch
from kernel_cases import (
    DEVICE,
    FEATURES,
    FROM_BOTH_ENDS,
    REAL,
    TOKEN_TENSORS,
    case_of,
    equal,
    exact,
    gpu,
    gradient_checker,
    inputs_of,
    options_of,
)

from mdnbench.kernels import chunk_momentum_delta_rule
from mdnbench.kernels.config import choose_backward_config, choose_config
from mdnbench.kernels.problem import limits_of


def grads_of(function, inputs, do, dstate):
    """Gradients by name, for `do` and `dstate` arriving."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    results = function(**leaves, output_final_state=True)
    return dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), (do, dstate))))


def fits(dtype, K, chunk_size, free_p):
    """Whether forward and backward have a configuration for it on this GPU."""
    shape = (K, K, chunk_size, dtype.itemsize, 16, free_p, *limits_of(torch.device(DEVICE, 0)))
    try:
        choose_config(*shape)
        choose_backward_config(*shape)
    except ValueError:
        return False
    return True


BF16_SIZES = {**REAL["h16d128"], "B": 1, "T": 257}
SIZES = {
    torch.bfloat16: BF16_SIZES,
    torch.float32: {**BF16_SIZES, "K": 64, "V": 64},  # at 128 the backward needs chunks of 32
}
# As in the forward: without decay the recurrence diverges (log_mu = 0) or forgets nothing (log_alpha = 0).
PROFILE_LIMITS = {
    "mu_one": {"value_error": 2e-2, "gradient_error": 3e-2, "log_gate_error": 5e-2},
    "alpha_one": {"value_error": 1e-2, "gradient_error": 2e-2, "log_gate_error": 5e-2},
}


# In float32, which takes long to compile.
FEW_FEATURES = (
    "free p", "tied p", "no L2 norm", "no beta, eta, p", "no state at all", "three value heads a head",
    "sizes that are no power of two", "packed", "packed, tied p, no initial state",
)  # fmt: skip


class TestOnGpu:
    """The public function, at real sizes, against the chunk form in float64.

    Of eight heads and more: the gradient of a gate at a last token, to which that of the final state arrives, is a sum
    of K V products of random signs, most of which cancel, and a single one may be all rounding.
    """

    pytestmark = gpu

    @pytest.fixture
    def check_gradients(self, evaluate, assert_close):
        return gradient_checker(evaluate, assert_close, chunk_momentum_delta_rule, exact)

    @pytest.mark.parametrize("feature", FEATURES)
    def test_features(self, feature, make_inputs, check_gradients):
        check_gradients(*case_of(feature, torch.bfloat16, make_inputs, T=257, HV=8, K=128, V=128))

    @pytest.mark.parametrize("feature", FEW_FEATURES)
    def test_features_in_float32(self, feature, make_inputs, check_gradients):
        check_gradients(*case_of(feature, torch.float32, make_inputs, T=257, HV=8, K=64, V=64))

    def test_float32_at_128(self, make_inputs, check_gradients):
        inputs = inputs_of(make_inputs, "layer", torch.float32, BF16_SIZES, ("p",))
        check_gradients(inputs, options_of({"chunk_size": 32}))

    @pytest.mark.parametrize("free_p", [True, False], ids=["free p", "tied p"])
    def test_float16(self, free_p, make_inputs, check_gradients):
        inputs = inputs_of(make_inputs, "mild", torch.float16, BF16_SIZES, () if free_p else ("p",))
        check_gradients(inputs, options_of({}))

    @pytest.mark.parametrize("dtype", SIZES, ids=["bf16", "fp32"])
    @pytest.mark.parametrize("free_p", [True, False], ids=["free p", "tied p"])
    def test_gate_profiles(self, profile, free_p, dtype, make_inputs, check_gradients):
        limits = PROFILE_LIMITS.get(profile, {}) if dtype == torch.bfloat16 else {}
        inputs = inputs_of(make_inputs, profile, dtype, SIZES[dtype], () if free_p else ("p",))
        check_gradients(inputs, options_of({}), **limits)

    @pytest.mark.parametrize("tokens", [1, 65, 1000])
    @pytest.mark.parametrize("free_p", [True, False], ids=["free p", "tied p"])
    @pytest.mark.parametrize("shape", REAL)
    def test_shapes(self, shape, free_p, tokens, make_inputs, check_gradients):
        sizes = {**REAL[shape], "T": tokens} | ({"B": 16} if shape == "one head" else {})
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, sizes, () if free_p else ("p",))
        check_gradients(inputs, options_of({}))

    @pytest.mark.parametrize("chunk_size", [16, 64, 128])
    @pytest.mark.parametrize(("K", "V"), [(16, 64), (32, 128), (20, 33), (40, 512)])
    def test_narrow_keys(self, K, V, chunk_size, make_inputs, check_gradients):
        """Tiles with more columns of V than of K."""
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**BF16_SIZES, "K": K, "V": V}, ("p",))
        check_gradients(inputs, options_of({"chunk_size": chunk_size}))

    @pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
    @pytest.mark.parametrize("tokens", [1, 15, 63, 65, 130, 777])
    def test_lengths_and_chunk_sizes(self, tokens, chunk_size, make_inputs, check_gradients):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**BF16_SIZES, "T": tokens}, ("p",))
        check_gradients(inputs, options_of({"chunk_size": chunk_size}))

    @pytest.mark.parametrize("free_p", [True, False], ids=["free p", "tied p"])
    @pytest.mark.parametrize("chunk_size", [64, 128])
    @pytest.mark.parametrize(
        ("dtype", "K"),
        [(torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 64), (torch.float32, 256)],
        ids=["bf16, 128", "bf16, 256", "fp32, 64", "fp32, 256"],
    )
    def test_what_fits_runs_and_the_rest_is_refused(self, dtype, K, chunk_size, free_p, make_inputs, check_gradients):
        sizes = {"B": 2, "H": 2, "HV": 4, "K": K, "V": K, "T": 257}
        inputs = inputs_of(make_inputs, "layer", dtype, sizes, () if free_p else ("p",))
        options = options_of({"chunk_size": chunk_size})
        if fits(dtype, K, chunk_size, free_p):
            check_gradients(inputs, options)
        else:
            inputs["v"].requires_grad_()
            with pytest.raises(ValueError, match=f"chunk_size={chunk_size} with K={K} .* use a smaller chunk_size"):
                chunk_momentum_delta_rule(**inputs, **options)

    @pytest.mark.parametrize("dtype", SIZES, ids=["bf16", "fp32"])
    @pytest.mark.parametrize("arriving", FROM_BOTH_ENDS)
    def test_gradients_that_arrive_at_one_end(self, arriving, dtype, make_inputs, check_gradients):
        """At gates that leave something of a gradient on its way through all tokens: those of a layer leave 1e-19."""
        inputs = inputs_of(make_inputs, "mild", dtype, {**SIZES[dtype], "T": 70})
        check_gradients(inputs, options_of({}), arriving=(arriving,))

    def test_a_long_sequence(self, make_inputs, check_gradients):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**BF16_SIZES, "T": 16384}, ("p",))
        check_gradients(inputs, options_of({}))

    @pytest.mark.parametrize("free_p", [True, False], ids=["free p", "tied p"])
    @pytest.mark.parametrize(("H", "HV"), [(1, 1), (3, 9), (1, 7), (4, 16)])
    def test_saving_memory(self, H, HV, free_p, make_inputs, check_gradients):
        """In halves of the value heads, uneven ones too."""
        sizes = {**BF16_SIZES, "B": 4, "H": H, "HV": HV}
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, sizes, () if free_p else ("p",))
        check_gradients(inputs, options_of({"save_memory": True}))

    def test_saving_memory_saves_it(self, make_inputs):
        """At the peak and, for as long as the graph is kept, the errors: a number for each of v."""
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**REAL["h16d128"], "T": 2048}, ("p", "initial_state"))
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        kept, peak = [], []
        for save_memory in (False, True):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            o, _ = chunk_momentum_delta_rule(**inputs, save_memory=save_memory)
            kept.append(torch.cuda.memory_allocated() - before)
            do = torch.ones_like(o)
            grads = torch.autograd.grad(o, list(inputs.values()), do)
            peak.append(torch.cuda.max_memory_allocated() - before)
            del o, do, grads
        errors_bytes = inputs["v"].numel() * inputs["v"].itemsize
        print(f"\npeak memory above the inputs: {peak[0] / 2**20:.0f} MiB, saved to {peak[1] / 2**20:.0f} MiB")
        assert kept[1] <= kept[0] - errors_bytes
        assert peak[1] <= peak[0] - errors_bytes

    def test_pointers_that_are_no_multiple_of_16(self, make_inputs, check_gradients):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, BF16_SIZES)
        for name in TOKEN_TENSORS:
            memory = torch.cat((inputs[name].flatten()[:1], inputs[name].flatten()))
            inputs[name] = memory[1:].view_as(inputs[name])
        check_gradients(inputs, options_of({}))

    def test_strides_and_dtypes(self, make_inputs, check_gradients):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**BF16_SIZES, "N": 3})
        for name in TOKEN_TENSORS:
            inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        inputs["beta"] = torch.stack((inputs["beta"], inputs["eta"]), dim=-1)[..., 0]
        inputs["log_mu"], inputs["log_alpha"] = inputs["log_mu"].half(), inputs["log_alpha"].double()
        inputs["initial_state"] = inputs["initial_state"].bfloat16()
        check_gradients(inputs, options_of({"cu_seqlens": [0, 0, 100, 257]}))

    @pytest.mark.parametrize("save_memory", [False, True])
    @pytest.mark.parametrize("heads", [(16, 16), (4, 16)], ids=["a group a head", "four value heads a head"])
    def test_ten_times_the_same_bits(self, heads, save_memory, make_inputs, evaluate):
        sizes = {**REAL["h16d128"], "T": 1000, "H": heads[0], "HV": heads[1]}
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, sizes, ("p",))
        first = evaluate(chunk_momentum_delta_rule, inputs, save_memory=save_memory)
        for _ in range(9):
            assert equal(evaluate(chunk_momentum_delta_rule, inputs, save_memory=save_memory), first)

    @pytest.mark.parametrize("name", ["q", "k", "v", "p", "log_alpha", "log_mu", "beta", "eta", "initial_state"])
    def test_gradient_of_one_input_alone(self, name, make_inputs, check_gradients):
        """Kernels without the code of the others."""
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, BF16_SIZES)
        check_gradients(inputs, options_of({}), wanted=[name])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_a_device_that_is_not_the_current_one(self, make_inputs, check_gradients):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, BF16_SIZES, device="cuda:1")
        assert torch.cuda.current_device() == 0
        check_gradients(inputs, options_of({}))
        assert torch.cuda.current_device() == 0

    def test_graph(self, make_inputs):
        """Forward and backward captured once and replayed, on inputs that changed since."""
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, BF16_SIZES)
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}

        def call():
            o, state = chunk_momentum_delta_rule(**inputs, **options_of({}))
            return torch.autograd.grad((o, state), list(inputs.values()), (do, dstate))

        do, dstate = torch.ones_like(inputs["v"]), torch.ones_like(inputs["initial_state"])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            computed = call()
        with torch.no_grad():
            for name, x in inputs_of(make_inputs, "mild", torch.bfloat16, {**BF16_SIZES, "seed": 1}).items():
                inputs[name].copy_(x)
        graph.replay()
        for got, expected in zip(computed, call()):
            assert torch.equal(got, expected)

    # What has more than 2^31 numbers, and memory in GiB for it.
    @pytest.mark.parametrize(
        ("sizes", "name", "chunk_size"),
        [
            ({"T": 100, "H": 1, "HV": 32, "K": 16, "V": 512}, "v", 64),
            ({"T": 100, "H": 32, "HV": 32, "K": 256, "V": 16}, "q", 64),
            ({"T": 100, "H": 1, "HV": 64, "K": 16, "V": 16}, "inverse", 128),
            ({"T": 1, "H": 16, "HV": 16, "K": 128, "V": 128}, "initial_state", 64),
        ],
        ids=["values", "keys", "chunk matrices", "states"],
    )
    def test_more_than_2_31_numbers(self, sizes, name, chunk_size, make_inputs):
        """Two sequences many times over; the first and the last two come out as the two do by themselves."""
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 64 * 2**30:
            pytest.skip("needs 64 GiB of free GPU memory")
        few = inputs_of(make_inputs, "layer", torch.bfloat16, {**sizes, "B": 2}, ("p",))
        numbers = 2 * sizes["HV"] * chunk_size**2 if name == "inverse" else few[name].numel()
        copies = 2**31 // numbers + 1

        def repeat(x):  # states have their sequences second
            return x.repeat(1, copies, 1, 1, 1) if x.ndim == 5 else x.repeat(copies, *[1] * (x.ndim - 1))

        do, dstate = (torch.ones_like(few[x]) for x in ("v", "initial_state"))
        expected = grads_of(exact, {key: x.double() for key, x in few.items()}, do.double(), dstate.double())
        many = {key: repeat(x) for key, x in few.items()}
        computed = grads_of(
            functools.partial(chunk_momentum_delta_rule, chunk_size=chunk_size), many, repeat(do), repeat(dstate)
        )
        for key, grad in computed.items():
            ends = (grad[:, :2], grad[:, -2:]) if grad.ndim == 5 else (grad[:2], grad[-2:])
            for got in ends:
                assert (got - expected[key]).norm() <= 2e-2 * expected[key].norm(), key
