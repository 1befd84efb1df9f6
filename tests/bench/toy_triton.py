"""One plain Triton kernel as a user of the tuner would describe it.

Not a test; the processes of the tuner import it by this name.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mdnbench.bench.tune_compile import compile_launch
from mdnbench.bench.tune_interface import Tunable


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


@dataclass(frozen=True)
class PlainTriton(Tunable):
    """y = 2 x for n numbers: what a user of the tuner writes for a kernel of their own."""

    n: int = 1000
    name: str = "scale"

    @property
    def run_variables(self):
        return {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}

    @property
    def device(self):
        return "cuda" if torch.cuda.is_available() else "cpu"

    def candidates(self):
        # 96 is no power of two: Triton refuses it.
        return [{"BLOCK": block, "num_warps": 4} for block in (128, 1024, 96)]

    def compile(self, candidate):
        x = torch.empty(self.n, device="meta")
        return [compile_launch(_scale_kernel, (x, x, self.n), candidate, capability=90)]

    def _launch(self, x, candidate):
        y = torch.full_like(x, torch.nan)
        grid = (triton.cdiv(self.n, candidate["BLOCK"]),)
        _scale_kernel[grid](x, y, self.n, **candidate)
        return y

    def run(self, candidate):
        x = torch.randn(self.n, device=self.device)
        return lambda: self._launch(x, candidate)

    def check(self, candidate):
        x = torch.randn(self.n, device=self.device)
        return None if torch.equal(self._launch(x, candidate), 2 * x) else "y is not 2 x"


@triton.jit
def _far_kernel(y_ptr, OFFSET: tl.constexpr, value):
    tl.store(y_ptr + OFFSET + tl.arange(0, 128), value)


@dataclass(frozen=True)
class WritesFar(Tunable):
    """A kernel that writes where there is no memory: for a GPU alone, in whose process every later call then fails."""

    name: str = "far"
    device: str = "cuda"

    def candidates(self):
        return [{"OFFSET": 0}, {"OFFSET": 1 << 36}, {"OFFSET": 128}]

    def check(self, candidate):
        y = torch.zeros(256, device="cuda")
        _far_kernel[(1,)](y, value=1.0, **candidate)
        return None if y.sum().item() == 128 else "y is not 1 at 128 places"

    def run(self, candidate):
        y = torch.zeros(256, device="cuda")
        return lambda: _far_kernel[(1,)](y, value=1.0, **candidate)
