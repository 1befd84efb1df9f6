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
from mdnbench.kernels.launch import launch

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
    monkeypatch.setattr(module, "_compiled", {})
    return FakeKernel()


def floats(first=0, dtype=torch.float32, numbers=8):
    """A tensor that starts `first` numbers after a multiple of 16 bytes."""
    memory = torch.zeros(64, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[first : first + numbers]


BASE = {"arguments": (floats(), floats(), None, 0.5, 6), "constants": CONSTANTS, "num_warps": 4}
SAME_CODE = {
    "other memory": {"arguments": (floats(), floats(4), None, 0.5, 6)},
    "other sizes": {"arguments": (floats(numbers=3), floats(numbers=0), None, 0.5, 6)},
    "another float": {"arguments": (floats(), floats(), None, 1.0, 6)},
    "another int": {"arguments": (floats(), floats(), None, 0.5, 2**31 - 1)},
}
OTHER_CODE = {
    "dtype": {"arguments": (floats(), floats(dtype=torch.float16), None, 0.5, 6)},
    "pointer that is no multiple of 16": {"arguments": (floats(), floats(1), None, 0.5, 6)},
    "tensor for None": {"arguments": (floats(), floats(), floats(), 0.5, 6)},
    "None for a tensor": {"arguments": (floats(), None, None, 0.5, 6)},
    "None for a float": {"arguments": (floats(), floats(), None, None, 6)},
    "int for a float": {"arguments": (floats(), floats(), None, 5, 6)},
    "1": {"arguments": (floats(), floats(), None, 0.5, 1)},
    "multiple of 16": {"arguments": (floats(), floats(), None, 0.5, 16)},
    "more than 32 bits": {"arguments": (floats(), floats(), None, 0.5, 2**31 + 2)},
    "negative, more than 32 bits": {"arguments": (floats(), floats(), None, 0.5, -(2**31) - 2)},
    "constant": {"constants": {**CONSTANTS, "BLOCK": 32}},
    "flag": {"constants": {**CONSTANTS, "FLAG": False}},
    "type": {"constants": {**CONSTANTS, "DTYPE": tl.float32}},
    "constants exchanged": {"constants": {"FLAG": 16, "BLOCK": True, "DTYPE": tl.float16}},
    "warps": {"num_warps": 8},
    "an option more": {"num_stages": 2},
    "another option of that value": {"num_warps": None, "num_stages": 4},
    "device": {"arguments": (torch.empty(8, device="meta"), floats(), None, 0.5, 6)},
}


@pytest.mark.parametrize("change", SAME_CODE)
def test_the_same_code(change, kernel):
    launch(kernel, (3,), **BASE)
    launch(kernel, (5, 2), **{**BASE, **SAME_CODE[change]})
    assert len(kernel.codes) == 1
    (run,) = kernel.codes[0].runs
    first, second, *others = SAME_CODE[change]["arguments"]
    values = (first.data_ptr(), second.data_ptr(), *others, *CONSTANTS.values())
    assert run == (5, 2, 1, 11, 7, (4, 1, 0), None, None, None, *values)


@pytest.mark.parametrize("change", OTHER_CODE)
def test_other_code(change, kernel):
    changed = {name: value for name, value in {**BASE, **OTHER_CODE[change]}.items() if value is not None}
    launch(kernel, (3,), **BASE)
    launch(kernel, (3,), **changed)
    assert len(kernel.codes) == 2
    launch(kernel, (3,), **BASE)
    launch(kernel, (3,), **changed)
    assert [len(code.runs) for code in kernel.codes] == [1, 1]  # each found again
    grid, arguments, options = kernel.launches[1]
    assert grid == (3,)
    assert all(got is given for got, given in zip(arguments, changed.pop("arguments"), strict=True))
    assert options == {**changed.pop("constants"), **changed}


def test_another_kernel(kernel):
    other = FakeKernel()
    launch(kernel, (3,), **BASE)
    launch(other, (3,), **BASE)
    assert len(kernel.codes) == len(other.codes) == 1


def test_what_triton_does_not_compile(kernel, monkeypatch):
    """The interpreter, and a launch that a hook of Triton took over: nothing to keep."""

    class Plain:
        launches = 0

        def __getitem__(self, grid):
            return lambda *arguments, **options: setattr(self, "launches", self.launches + 1)

    plain = Plain()
    monkeypatch.setattr(FakeKernel, "__getitem__", lambda self, grid: plain[grid])
    for _ in range(2):
        launch(plain, (3,), **BASE)
        launch(kernel, (3,), **BASE)
    assert plain.launches == 4


@triton.jit(do_not_specialize=["n"])
def scaled_copy_kernel(x_ptr, y_ptr, bias_ptr, scale, n, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b_x = tl.load(x_ptr + o, mask=o < n, other=0.0).to(tl.float32) * scale
    if bias_ptr is not None:
        b_x += tl.load(bias_ptr + o, mask=o < n, other=0.0)
    tl.store(y_ptr + o, b_x.to(y_ptr.dtype.element_ty), mask=o < n)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_kernel_that_is_launched_again(scale):
    """On a GPU compiled once for each kind of arguments; the second round runs what the first compiled."""
    memory = torch.arange(65.0, device=DEVICE)
    for _ in range(2):
        for first, dtype, bias, n in product((0, 1), (torch.float32, torch.float16), (None, memory), (1, 16, 23)):
            x, y = memory[first : first + 32].to(dtype), torch.zeros(33, device=DEVICE)[first:]
            launch(scaled_copy_kernel, (1,), (x, y, bias, scale, n), {"SIZE": 32}, num_warps=1)
            expected = x.float() * scale + (0 if bias is None else bias[:32])
            assert torch.equal(y[:n], expected[:n])
            assert not y[n:].any()
