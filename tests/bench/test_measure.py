"""Times, memory and correctness of calls whose answers are known. All in this process, on the CPU."""

import re
import sys
import time
import weakref

import psutil
import pytest
import torch

from mdnbench.baselines.inputs import make_inputs
from mdnbench.baselines.registry import get_provider, providers
from mdnbench.baselines.workload import Workload
from mdnbench.bench import correctness, measure, memory
from mdnbench.bench.requests import TIMED_CALLS, Block, Prepare
from mdnbench.bench.results import Point
from mdnbench.bench.server import Server

CPU = torch.device("cpu")
MIB = 1 << 20


def tensor_of(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MIB // 4)


def test_a_device_has_its_number_and_becomes_the_current_one(monkeypatch) -> None:
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert measure.use_device("cpu") == CPU
    assert current == []
    assert measure.use_device("cuda") == torch.device("cuda", 0)
    assert measure.use_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 0), torch.device("cuda", 1)]


# Timing


def test_samples_are_wall_times_of_single_calls() -> None:
    samples = measure.take_block(measure.time_on_cpu, lambda: time.sleep(0.01), max_seconds=0.3, max_samples=100)
    assert 3 <= len(samples) <= 30
    assert min(samples) >= 10
    assert sorted(samples)[len(samples) // 2] < 20


def test_a_block_warms_up_until_calls_get_no_faster() -> None:
    times = iter([9.0, 5.0, 3.0, 3.1, 7.0, 8.0])
    samples = measure.take_block(lambda call, count: [next(times) for _ in range(count)], None, 60.0, 2)
    assert samples == [7.0, 8.0]


def test_a_call_longer_than_a_quarter_of_the_block_is_a_sample_at_once() -> None:
    calls = []
    samples = measure.take_block(measure.time_on_cpu, lambda: calls.append(time.sleep(0.06)), 0.05, 100)
    assert len(samples) == len(calls) == 1


def test_a_block_ends_at_its_largest_number_of_samples() -> None:
    assert len(measure.take_block(measure.time_on_cpu, lambda: None, 60.0, 17)) == 17


def test_calls_go_on_until_one_is_of_the_order_of_the_one_before() -> None:
    def calls_after_a_first_one_of(first_call_s: float, *seconds: float) -> int:
        remaining = list(seconds)
        measure.call_until_settled(lambda: time.sleep(remaining.pop(0)), first_call_s, lambda: None)
        return len(seconds) - len(remaining)

    assert calls_after_a_first_one_of(0.02, 0.02, 0.02) == 1
    assert calls_after_a_first_one_of(100.0, 0.02, 0.02, 0.02) == 2  # compiled at the first call
    assert calls_after_a_first_one_of(100.0, 0.2, 0.02, 0.02, 0.02) == 3  # and something more at the second
    assert calls_after_a_first_one_of(0.001, 0.2, 0.02, 0.02) == 1  # a slower call is no sign of compilation
    assert calls_after_a_first_one_of(100.0, *(10**-i for i in range(1, 20))) <= measure.MAX_SETTLING_CALLS


def test_calls_are_taken_in_turn() -> None:
    seen = []
    call = measure.in_turn([lambda: seen.append("a"), lambda: seen.append("b")])
    for _ in range(5):
        call()
    assert seen == ["a", "b", "a", "b", "a"]
    only = list
    assert measure.in_turn([only]) is only


@pytest.mark.parametrize(
    ("free_bytes", "cache", "sets"), [(1 << 40, "cold", 2), (1 << 40, "warm", 1), (1 << 10, "cold", 1)]
)
def test_cold_calls_take_two_sets_of_inputs_where_there_is_room(monkeypatch, free_bytes, cache, sets) -> None:
    point = Point("gdn-torch", Workload(seq_len=64, head_dim_k=16, head_dim_v=16, heads=2), "forward_backward", "eager")
    monkeypatch.setattr(Point, "cache", cache)
    monkeypatch.setattr(Server, "_free_bytes", lambda self: free_bytes)
    phases = []
    server = Server("cpu", phases.append)
    server.time_calls["cold"] = measure.time_on_cpu
    assert server.answer(Prepare(point, seed=5)).input_sets == sets
    found = server.inputs[get_provider("gdn-torch").operator]
    assert len(found) == sets
    expected = [make_inputs(get_provider("gdn-torch").operator, point.workload, seed) for seed in (5, 7)[:sets]]
    for (inputs, d_output), (same, d_same) in zip(found, expected):  # seed 6 is that of the correctness check
        assert all(torch.equal(inputs[name], same[name]) for name in inputs)
        assert torch.equal(d_output, d_same)
    assert len(server.answer(Block(point, 10.0, 7))) == 7
    assert phases[-1] == TIMED_CALLS


def test_modes_time_what_they_name() -> None:
    counts = {"forward": 0, "backward": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            counts["forward"] += 1
            return 2 * x

        @staticmethod
        def backward(ctx, d_o):
            counts["backward"] += 1
            return 2 * d_o

    x, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    d_output = torch.tensor([1.0, 2.0, 3.0])

    def calls_of(mode: str, times: int = 3):
        counts.update(forward=0, backward=0)
        timed = measure.open_call(lambda: Counted.apply(x), mode, [x, unused], d_output)
        results = [timed() for _ in range(times)]
        return (counts["forward"], counts["backward"]), results[-1]

    taken, output = calls_of("forward")
    assert taken == (3, 0)
    assert not output.requires_grad  # as in inference
    for mode, expected in (("backward", (1, 3)), ("forward_backward", (3, 3))):
        taken, (gradient, nothing) = calls_of(mode)
        assert taken == expected
        assert gradient.tolist() == [2.0, 4.0, 6.0]
        assert nothing is None


# Memory


def test_peak_memory_of_known_allocations() -> None:
    given = [tensor_of(3)]
    given.append(given[0][:10])  # a view costs nothing

    def call() -> torch.Tensor:
        a = tensor_of(4)
        b = tensor_of(8)
        del a
        c = tensor_of(2)  # 10 now, 12 before
        del b, c
        return tensor_of(1)

    assert memory.bytes_of(given) == 3 * MIB
    assert memory.peak_memory_bytes(lambda: call, given, CPU) == (3 + 12) * MIB


def test_peak_memory_of_backward_holds_what_forward_left() -> None:
    def open_call():
        tensor_of(64)  # released before the call
        held = tensor_of(5)

        def call() -> tuple[torch.Tensor, ...]:
            return held, tensor_of(2), tensor_of(1)

        return call

    assert memory.peak_memory_bytes(open_call, [], CPU) == (5 + 2 + 1) * MIB


def test_measuring_memory_again_and_again_does_not_leak() -> None:
    def call() -> torch.Tensor:
        x = torch.ones(64)
        for _ in range(500):
            x = x * 0.5
        return x

    sizes = []
    for _ in range(25):
        memory.peak_memory_bytes(lambda: call, [], CPU)
        sizes.append(psutil.Process().memory_info().rss)
    assert sizes[-1] - sizes[4] < 16 * MIB


def test_saved_memory_counts_each_storage_once_and_no_inputs() -> None:
    x = torch.ones(MIB // 4, requires_grad=True)  # 1 MiB

    def call() -> torch.Tensor:
        y = x.exp()  # saves y
        z = y * x  # saves y again, and the input x
        return z.tanh()  # saves its own output

    assert memory.saved_memory_bytes(call, [x]) == 2 * MIB
    assert memory.saved_memory_bytes(lambda: x + 1, [x]) == 0


def test_saved_memory_releases_what_it_looked_at() -> None:
    x = torch.ones(8, requires_grad=True)
    outputs = []

    def call() -> torch.Tensor:
        y = x.tanh()  # an output that is its own saved tensor could keep itself alive
        outputs.append(weakref.ref(y.untyped_storage()))
        return y

    assert memory.saved_memory_bytes(call, [x]) == 32
    assert outputs[0]() is None


# Correctness

WORKLOAD = Workload(seq_len=64, head_dim_k=16, head_dim_v=16, heads=2, chunk_size=16)


def test_relative_error() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert correctness.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert correctness.relative_error(torch.tensor([3.0, 4.0]), 0 * truth) == 5.0  # no scale: the norm itself
    assert correctness.relative_error(0 * truth, 0 * truth) == 0.0
    assert correctness.relative_error(torch.tensor([3.0, torch.nan]), truth) != 0.0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_our_own_providers_are_correct_in_every_dtype(dtype: str) -> None:
    for name in ("mdn-torch", "gdn-torch"):
        check = correctness.check(get_provider(name), WORKLOAD.with_(dtype=dtype), "forward_backward", 0, CPU)
        assert check.reason is None, f"{name}: {check.reason}"
        assert set(check.relative_error) >= {"o", "dq", "dk", "dv", "dlog_alpha", "dbeta"}


def test_forward_mode_checks_the_output_alone() -> None:
    check = correctness.check(get_provider("gdn-torch"), WORKLOAD, "forward", 0, CPU)
    assert set(check.relative_error) == {"o"}


def test_long_sequences_and_large_batches_are_checked_shortened() -> None:
    provider = get_provider("gdn-torch")
    long = WORKLOAD.with_(seq_len=8192, batch=16)
    assert correctness.checked_workload(provider, long, "forward") == WORKLOAD.with_(seq_len=512, batch=2)
    assert correctness.checked_workload(provider, WORKLOAD, "forward") == WORKLOAD


def test_the_check_uses_other_inputs_than_the_timed_ones(monkeypatch) -> None:
    seeds = []

    def spy(operator, workload, seed, *args, **kwargs):
        seeds.append(seed)
        return make_inputs(operator, workload, seed, *args, **kwargs)

    monkeypatch.setattr(correctness, "make_inputs", spy)
    correctness.check(get_provider("gdn-torch"), WORKLOAD, "forward", 700, CPU)
    assert set(seeds) == {701}


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("toy-good", "forward_backward", None),
        ("toy-nan", "forward", "o holds NaN or infinity at 64 tokens"),
        ("toy-unwritten", "forward", "o holds NaN or infinity|o has a relative error of"),
        ("toy-wrong-shape", "forward", r"o is float32 \[1, 63, 2, 16\], not float32 \[1, 64, 2, 16\]"),
        ("toy-wrong-dtype", "forward", r"o is float64 \[1, 64, 2, 16\], not float32 \[1, 64, 2, 16\]"),
        ("toy-wrong-gradient", "forward", None),
        ("toy-wrong-gradient", "backward", "dlog_alpha has a relative error of 0.01 at 64 tokens, 0.002 is allowed"),
        ("toy-drops-gradient", "backward", "dlog_alpha has a relative error of 1 "),
    ],
)
def test_wrong_results_are_named(name: str, mode: str, reason: str | None) -> None:
    check = correctness.check(providers()[name], WORKLOAD, mode, 0, CPU)
    if reason is None:
        assert check.reason is None
    else:
        assert re.match(reason, check.reason), check.reason


@pytest.mark.skipif(sys.platform != "linux", reason="fresh memory can be filled with glibc only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fresh_memory_is_poisoned_while_a_provider_is_checked(dtype: torch.dtype) -> None:
    for count in (100, 10_000, 1_000_000):
        with correctness.poisoned_memory(torch.Size([count]), dtype, CPU):
            fresh = torch.empty(count, dtype=dtype)
        assert not (fresh.abs() < 1e38).any()  # huge or NaN


def test_tolerances_are_wider_for_gates_only() -> None:
    assert correctness.tolerance("float32", "o") == 1e-4
    assert correctness.tolerance("float32", "dv") == 1e-3
    assert correctness.tolerance("float32", "dlog_mu") == 2e-3
    assert correctness.tolerance("bfloat16", "dq") == 2e-2


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_what_is_no_tensor_is_named_with_its_provider(mode: str) -> None:
    with pytest.raises(TypeError, match=r"^toy-tuple returned a tuple where the output tensor is due: what build"):
        correctness.check(providers()["toy-tuple"], WORKLOAD, mode, 0, CPU)
