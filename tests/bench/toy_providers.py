"""Providers of a toy operator, good ones and broken ones, as a third party's package would bring them.

`conftest.py` installs this file as a distribution with entry points; it is not a test and not imported by one.
"""

import ctypes
import os
import sys
import time

import torch

from mdnbench.baselines.provider import Operator, Provider

TOY = Operator(
    name="toy",
    title="Toy",
    gates=("log_alpha",),
    select=lambda workload, inputs: {name: inputs[name] for name in ("v", "log_alpha")},
    truth=lambda workload, inputs: inputs["v"] * inputs["log_alpha"].exp().unsqueeze(-1),
)


def toy(inputs):
    return inputs["v"] * inputs["log_alpha"].exp().unsqueeze(-1).to(inputs["v"].dtype)


class Good(Provider):
    name = "toy-good"
    operator = TOY

    def build(self, workload, inputs):
        return lambda: toy(inputs)


class Chunked(Good):
    name = "toy-chunked"
    chunk_sizes = (16, 32)


class Sleeps(Provider):
    name = "toy-sleeps"
    operator = TOY
    calls = 0

    def build(self, workload, inputs):
        def call():
            Sleeps.calls += 1
            time.sleep(0.005)
            return toy(inputs)

        return call


class ForwardOnly(Good):
    name = "toy-forward-only"
    modes = ("forward",)


class Missing(Good):
    name = "toy-missing"
    package = "a_package_that_nobody_has"
    install = "pip install it"


class Segfaults(Provider):
    name = "toy-segfaults"
    operator = TOY

    def build(self, workload, inputs):
        return lambda: ctypes.string_at(0)


class HangsAtFirst(Provider):
    name = "toy-hangs-at-first"
    operator = TOY

    def build(self, workload, inputs):
        return lambda: time.sleep(3600)


class HangsLater(Provider):
    """Right until the sleeping provider has been timed beside it, then it blocks without releasing the interpreter."""

    name = "toy-hangs-later"
    operator = TOY

    def build(self, workload, inputs):
        def call():
            if Sleeps.calls > 4:  # first call, check, peak and saved memory
                ctypes.PyDLL(None).sleep(3600)
            return toy(inputs)

        return call


class Allocates(Provider):
    name = "toy-allocates"
    operator = TOY

    def build(self, workload, inputs):
        def call():
            kept = []
            while True:
                kept.append(torch.ones(4 << 20))  # 16 MiB

        return call


class AllocatesAtOnce(Provider):
    name = "toy-allocates-at-once"
    operator = TOY

    def build(self, workload, inputs):
        return lambda: torch.empty(1 << 60, dtype=torch.int8, device=inputs["v"].device)


class ReturnsNan(Provider):
    name = "toy-nan"
    operator = TOY

    def build(self, workload, inputs):
        return lambda: toy(inputs) * torch.nan


class Unwritten(Provider):
    """Forgets the last token: right only where fresh memory happens to be zero."""

    name = "toy-unwritten"
    operator = TOY
    modes = ("forward",)

    def build(self, workload, inputs):
        def call():
            o = torch.empty_like(inputs["v"])
            o[:, :-1] = toy(inputs)[:, :-1]
            return o

        return call


class WrongShape(Provider):
    name = "toy-wrong-shape"
    operator = TOY
    modes = ("forward",)

    def build(self, workload, inputs):
        return lambda: toy(inputs)[:, :-1]


class WrongDtype(Provider):
    name = "toy-wrong-dtype"
    operator = TOY
    modes = ("forward",)

    def build(self, workload, inputs):
        return lambda: toy(inputs).double()


class ReturnsTuple(Provider):
    """Hands back a final state as well, as the functions of many packages do."""

    name = "toy-tuple"
    operator = TOY

    def build(self, workload, inputs):
        return lambda: (toy(inputs), None)


class WrongGradient(Provider):
    """The output is right, and so is the gradient of v; that of log_alpha is off by 1 %."""

    name = "toy-wrong-gradient"
    operator = TOY

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v, log_alpha):
            ctx.save_for_backward(v, log_alpha)
            return v * log_alpha.exp().unsqueeze(-1)

        @staticmethod
        def backward(ctx, d_o):
            v, log_alpha = ctx.saved_tensors
            alpha = log_alpha.exp()
            return d_o * alpha.unsqueeze(-1), 1.01 * alpha * (d_o * v).sum(-1)

    def build(self, workload, inputs):
        return lambda: self.Scale.apply(inputs["v"], inputs["log_alpha"])


class DropsGradient(Provider):
    """Does not connect log_alpha to the output."""

    name = "toy-drops-gradient"
    operator = TOY

    def build(self, workload, inputs):
        return lambda: toy({"v": inputs["v"], "log_alpha": inputs["log_alpha"].detach()})


class Raises(Provider):
    name = "toy-raises"
    operator = TOY

    def build(self, workload, inputs):
        raise KeyError("no such kernel\nand a second line")


class Exits(Provider):
    """Says so in red."""

    name = "toy-exits"
    operator = TOY

    def build(self, workload, inputs):
        return lambda: sys.exit("\x1b[91m\x1b[1menough\x1b[0m")


class Quits(Provider):
    """Prints, and ends the process without a signal."""

    name = "toy-quits"
    operator = TOY

    def build(self, workload, inputs):
        print("toy-quits was here", flush=True)
        return lambda: ctypes.CDLL(None)._exit(7)


class DeviceAssert(Provider):
    """Reads out of bounds on the GPU, which no later call of the process survives."""

    name = "toy-device-assert"
    operator = TOY
    devices = ("cuda",)

    def build(self, workload, inputs):
        index = torch.tensor([1 << 40], device=inputs["v"].device)
        return lambda: toy(inputs) + torch.zeros(4, device=index.device)[index]


class Uncapturable(Provider):
    """Asks the GPU for a number in the middle of the call."""

    name = "toy-uncapturable"
    operator = TOY
    devices = ("cuda",)

    def build(self, workload, inputs):
        return lambda: toy(inputs) + 0 * inputs["v"].sum().item()


class SaysUncapturable(Uncapturable):
    name = "toy-says-uncapturable"
    cuda_graph = False


class TellsProcess(Good):
    """Notes which process it was built in."""

    name = "toy-tells-process"
    built_in = None

    def build(self, workload, inputs):
        self.built_in = os.getpid()
        return super().build(workload, inputs)

    def notes(self, workload, mode):
        return (f"built in {self.built_in}",)


class TellsProcessToo(TellsProcess):
    name = "toy-tells-process-too"


class Alone(TellsProcess):
    name = "toy-alone"
    shares_process = False


class AloneToo(TellsProcess):
    name = "toy-alone-too"
    shares_process = False


class WrongAndKnown(Good):
    """Wrong, for a reason that is known."""

    name = "toy-wrong-and-known"

    def build(self, workload, inputs):
        return lambda: toy(inputs) * 1.5

    def notes(self, workload, mode):
        return ("its refusal was lifted (https://example.org/issues/1)",)
