"""What is launched again without Triton's look-up: only what Triton would choose for the same arguments."""

from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from mdnbench.kernels import launch as module
from mdnbench.kernels.launch import Launch

CONSTANTS = {"BLOCK": 16, "FLAG": True, "DTYPE": tl.float16}


class FakeCode(CompiledKernel):
    """Compiled code that notes what it is run with."""

    def __init__(self):
        self.function, self.packed_metadata, self._run, self.runs = 7, (4, 1, 0), self._note, []

    def _note(self, *arguments):
        self.runs.append(arguments)


class FakeKernel(JITFunction):
    """A kernel that Triton would compile; notes the code of each launch that goes through Triton."""

    def __init__(self):
        self.fn, self.codes, self.launches = object(), [], []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **options):
            self.launches.append((grid, arguments, options))
            self.codes.append(FakeCode())
            return self.codes[-1]

        return compile_and_run


class FakeDriver:
    class active:
        @staticmethod
        def get_current_stream(device):
            return 11


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "driver", FakeDriver)
    monkeypatch.setattr(module, "_codes", {})
    return FakeKernel()


def floats(first=0, dtype=torch.float32, numbers=8):
    """A tensor that starts `first` numbers after a multiple of 16 bytes."""
    memory = torch.zeros(64, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[first : first + numbers]


BASE = (floats(), floats(), None)
SAME_CODE = {"other memory": (floats(), floats(4), None), "other sizes": (floats(numbers=3), floats(numbers=0), None)}
OTHER_CODE = {
    "dtype": (floats(), floats(dtype=torch.float16), None),
    "pointer that is no multiple of 16": (floats(), floats(1), None),
    "another pointer that is none": (floats(1), floats(), None),
    "tensor for None": (floats(), floats(), floats()),
    "None for a tensor": (floats(), None, None),
    "device": (torch.empty(8, device="meta"), floats(), None),
}


def launch_of(kernel):
    return Launch(kernel, (5, 2), (0.5, 6), CONSTANTS, num_warps=4)


@pytest.mark.parametrize("change", SAME_CODE)
def test_the_same_code(change, kernel):
    launch = launch_of(kernel)
    launch(*BASE)
    launch(*SAME_CODE[change])
    assert len(kernel.codes) == 1
    (run,) = kernel.codes[0].runs
    first, second, third = SAME_CODE[change]
    values = (first.data_ptr(), second.data_ptr(), third, 0.5, 6, *CONSTANTS.values())
    assert run == (5, 2, 1, 11, 7, (4, 1, 0), None, None, None, *values)


@pytest.mark.parametrize("change", OTHER_CODE)
def test_other_code(change, kernel):
    launch = launch_of(kernel)
    changed = OTHER_CODE[change]
    for _ in range(2):
        launch(*BASE)
        launch(*changed)
    assert [len(code.runs) for code in kernel.codes] == [1, 1]  # each found again
    grid, arguments, options = kernel.launches[1]
    assert grid == (5, 2)
    assert all(got is given for got, given in zip(arguments, (*changed, 0.5, 6), strict=True))
    assert options == {**CONSTANTS, "num_warps": 4}


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"grid": (7,)}, 1),
        ({"numbers": (2.0, 7)}, 1),
        ({"numbers": (0.5, 2**31 - 1)}, 1),
        ({"numbers": (0.5, 16)}, 2),
        ({"numbers": (0.5, 1)}, 2),
        ({"numbers": (0.5, 2**31 + 2)}, 2),
        ({"numbers": (0.5, -(2**31) - 2)}, 2),
        ({"numbers": (5, 6)}, 2),
        ({"constants": {**CONSTANTS, "BLOCK": 32}}, 2),
        ({"constants": {**CONSTANTS, "FLAG": False}}, 2),
        ({"constants": {**CONSTANTS, "DTYPE": tl.float32}}, 2),
        ({"constants": {"FLAG": 16, "BLOCK": True, "DTYPE": tl.float16}}, 2),
        ({"options": {"num_warps": 8}}, 2),
        ({"options": {"num_warps": 4, "num_stages": 2}}, 2),
        ({"options": {"num_stages": 4}}, 2),
    ],
)
def test_launches_of_other_shapes_share_code(changes, codes, kernel):
    """That of a kernel, compiled for kinds of numbers and for constants."""
    base = {"grid": (5, 2), "numbers": (0.5, 6), "constants": CONSTANTS, "options": {"num_warps": 4}}
    for it in (base, {**base, **changes}) * 2:
        Launch(kernel, it["grid"], it["numbers"], it["constants"], **it["options"])(*BASE)
    assert len(kernel.codes) == codes
    other = FakeKernel()
    launch_of(other)(*BASE)
    assert (len(kernel.codes), len(other.codes)) == (codes, 1)


def test_what_triton_does_not_compile(kernel, monkeypatch):
    """The interpreter, and a launch that a hook of Triton took over: nothing to keep."""

    class Plain:
        launches = 0

        def __getitem__(self, grid):
            return lambda *arguments, **options: setattr(self, "launches", self.launches + 1)

    plain = Plain()
    monkeypatch.setattr(FakeKernel, "__getitem__", lambda self, grid: plain[grid])
    interpreted, hooked = launch_of(plain), launch_of(kernel)
    for _ in range(2):
        interpreted(*BASE)
        hooked(*BASE)
    assert plain.launches == 4


@triton.jit(do_not_specialize=["n"])
def scaled_copy_kernel(x_ptr, y_ptr, bias_ptr, scale, n, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b_x = tl.load(x_ptr + o, mask=o < n, other=0.0).to(tl.float32) * scale
    if bias_ptr is not None:
        b_x += tl.load(bias_ptr + o, mask=o < n, other=0.0)
    tl.store(y_ptr + o, b_x.to(y_ptr.dtype.element_ty), mask=o < n)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("n", [1, 16, 23])
def test_a_kernel_that_is_launched_again(scale, n):
    """On a GPU compiled once for each kind of tensors; the second round runs what the first compiled."""
    memory = torch.arange(65.0, device=DEVICE)
    launch = Launch(scaled_copy_kernel, (1,), (scale, n), {"SIZE": 32}, num_warps=1)
    for _ in range(2):
        for first, dtype, bias in product((0, 1), (torch.float32, torch.float16), (None, memory)):
            x, y = memory[first : first + 32].to(dtype), torch.zeros(33, device=DEVICE)[first:]
            launch(x, y, bias)
            expected = x.float() * scale + (0 if bias is None else bias[:32])
            assert torch.equal(y[:n], expected[:n])
            assert not y[n:].any()
