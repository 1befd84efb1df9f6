"""Seeded inputs: gate profiles, the tensors of a workload, and the float64 truth of an operator on them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .provider import Inputs, Operator
from .workload import Workload

GATES = ("log_alpha", "log_mu", "beta", "eta")
RESET_PROBABILITY = 0.05

# The layer as its authors initialise it at 400M: its width, the spread of its projection weights, its clamp of log_mu.
LAYER_HIDDEN_SIZE = 1024
LAYER_WEIGHT_STD = 0.02
LAYER_MIN_LOG_MU = -2.0
LAYER_DECAY_RATE_MAX = 16.0  # A and Mu, uniform from 0
LAYER_FACTOR_MAX = 4.0  # exp(log_factor), uniform from 0
LAYER_STEP_RANGE = (1e-3, 0.1)  # softplus(dt_bias) and softplus(mu_bias), log-uniform


class Noise:
    """Random numbers of one shape from one seeded generator, on the generator's device, in float32."""

    def __init__(self, generator: torch.Generator, shape: tuple[int, ...]) -> None:
        self.generator, self.shape = generator, shape

    def normal(self) -> Tensor:
        """Standard normal."""
        return torch.randn(self.shape, generator=self.generator, device=self.generator.device)

    def uniform(self, per_head: bool = False) -> Tensor:
        """Uniform in [0, 1); with `per_head`, one number a head, for all tokens."""
        shape = self.shape[-1:] if per_head else self.shape
        return torch.rand(shape, generator=self.generator, device=self.generator.device)

    def constant(self, value: float) -> Tensor:
        """`value` everywhere."""
        return torch.full(self.shape, value, device=self.generator.device)


@dataclass(frozen=True)
class GateProfile:
    """A way to draw the gates log_alpha, log_mu, beta, eta [B, T, HV], given as its difference from "mild".

    Attributes:
        name: what the CLI and the results call it.
        summary: one line for people.
        changes: the gates that differ from "mild".
        draw: from noise of shape [B, T, HV] and the "mild" gates to the gates that change, float32.
    """

    name: str
    summary: str
    changes: tuple[str, ...]
    draw: Callable[[Noise, Inputs], Inputs]


def _mild(noise: Noise) -> Inputs:
    return {
        "log_alpha": -0.1 * F.softplus(noise.normal()),
        "log_mu": -0.5 * F.softplus(noise.normal()),
        "beta": noise.normal().sigmoid(),
        "eta": 2 * noise.normal().sigmoid(),
    }


def _constant(name: str, gate: str, value: float) -> GateProfile:
    summary = f"{gate} = {value:g} at every token"
    return GateProfile(name, summary, (gate,), lambda noise, mild: {gate: noise.constant(value)})


def _resets(value: float) -> GateProfile:
    def draw(noise: Noise, mild: Inputs) -> Inputs:
        return {"log_alpha": mild["log_alpha"].masked_fill(noise.uniform() < RESET_PROBABILITY, value)}

    summary = f"log_alpha = {value:g} at {RESET_PROBABILITY:.0%} of the tokens, at random"
    return GateProfile(f"reset={value:g}", summary, ("log_alpha",), draw)


def _log_mu_switching(noise: Noise, mild: Inputs) -> Inputs:
    return {"log_mu": torch.where(noise.uniform() < 0.5, 0.0, -2.0)}


def _layer(noise: Noise, mild: Inputs) -> Inputs:
    """The paper's stable gating at the authors' initial parameters, for a hidden state of unit variance."""
    projection_std = LAYER_WEIGHT_STD * math.sqrt(LAYER_HIDDEN_SIZE)
    a, m, b, e = (projection_std * noise.normal() for _ in range(4))

    def step_bias() -> Tensor:
        low, high = map(math.log, LAYER_STEP_RANGE)
        step = torch.exp(low + (high - low) * noise.uniform(per_head=True))
        return step.expm1().log()  # the inverse of softplus

    decay_rate = LAYER_DECAY_RATE_MAX * noise.uniform(per_head=True)
    momentum_rate = LAYER_DECAY_RATE_MAX * noise.uniform(per_head=True)
    eta = 1 + torch.tanh(e / math.sqrt(LAYER_HIDDEN_SIZE))
    tangent_squared = (eta * LAYER_FACTOR_MAX * noise.uniform(per_head=True)).square()  # tan^2(theta)
    return {
        # log cos^2(theta) = -log(1 + tan^2(theta)), sin^2(theta) = tan^2(theta) / (1 + tan^2(theta))
        "log_alpha": -tangent_squared.log1p() - decay_rate * F.softplus(a + step_bias()),
        "log_mu": (-momentum_rate * F.softplus(m + step_bias())).clamp(min=LAYER_MIN_LOG_MU),
        "beta": tangent_squared / (1 + tangent_squared) * b.sigmoid(),
        "eta": eta,
    }


_PROFILES = (
    GateProfile("mild", "slow decays, every gate random", (), lambda noise, mild: {}),
    # Undamped momentum (0) makes the outputs of MDN grow with length: 1e4 at 256 tokens, beyond float32 at 4096.
    *(_constant(f"log_mu={value:g}", "log_mu", value) for value in (0.0, -1.0, -2.0, -8.0, -math.inf)),
    GateProfile("log_mu=0/-2", "log_mu = 0 or -2, at random", ("log_mu",), _log_mu_switching),
    _constant("log_alpha=-5", "log_alpha", -5.0),
    _resets(-20.0),
    _resets(-math.inf),
    _constant("alpha=1", "log_alpha", 0.0),
    _constant("beta=0", "beta", 0.0),
    _constant("beta=1e-5", "beta", 1e-5),
    _constant("beta=1", "beta", 1.0),
    _constant("eta=2", "eta", 2.0),
    GateProfile("layer", "the MDN layer at its authors' initial parameters", GATES, _layer),
)
GATE_PROFILES: dict[str, GateProfile] = {profile.name: profile for profile in _PROFILES}


def get_gate_profile(name: str) -> GateProfile:
    """The profile called `name`.

    Raises:
        ValueError: when there is none, with the nearest names.
    """
    if name not in GATE_PROFILES:
        near = difflib.get_close_matches(name, GATE_PROFILES, cutoff=0.4) or list(GATE_PROFILES)
        raise ValueError(f"gates={name!r} is unknown: choose {', '.join(near)}")
    return GATE_PROFILES[name]


def distinct_profiles(operator: Operator) -> list[str]:
    """Names of the gate profiles that differ for `operator`: a gate it does not read makes no difference to it."""
    return [name for name, p in GATE_PROFILES.items() if name == "mild" or set(p.changes) & set(operator.gates)]


@cache
def refused_gates(operator: Operator, gates: str) -> str | None:
    """Why `operator` cannot express the gate profile `gates`, or None when it can."""
    few_tokens = Workload(seq_len=256, head_dim_k=16, head_dim_v=16, gates=gates)
    try:
        make_inputs(operator, few_tokens, seed=0)
    except ValueError as error:
        return str(error)
    return None


def make_inputs(
    operator: Operator,
    workload: Workload,
    seed: int,
    device: torch.device | None = None,
    requires_grad: bool = True,
) -> tuple[Inputs, Tensor]:
    """The inputs of `operator` on `workload`, and the gradient that arrives at its output.

    q, k, v and the gradient are standard normal in the workload's dtype, the gates float32. They depend on the seed,
    the device and the workload alone, its chunk size excepted: operators see the same q, k, v and gates, and every gate
    profile comes with the same q, k, v and with the "mild" gates it does not change.

    Args:
        operator: whose inputs.
        workload: the sizes, the dtype and the gate profile.
        seed: any whole number.
        device: where; None means the workload's device.
        requires_grad: whether the inputs ask for gradients.

    Returns:
        The inputs by name, each a leaf, and d_output [B, T, HV, V].

    Raises:
        ValueError: where the gate profile is unknown or the operator cannot express it.
    """
    profile = get_gate_profile(workload.gates)
    device = torch.device(workload.device) if device is None else torch.device(device)
    dtype = getattr(torch, workload.dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, head_dim: int) -> Tensor:
        return Noise(generator, (workload.batch, workload.seq_len, heads, head_dim)).normal().to(dtype)

    common = {
        "q": normal(workload.heads, workload.head_dim_k),
        "k": normal(workload.heads, workload.head_dim_k),
        "v": normal(workload.value_heads, workload.head_dim_v),
    }
    d_output = normal(workload.value_heads, workload.head_dim_v)
    noise = Noise(generator, (workload.batch, workload.seq_len, workload.value_heads))
    mild = _mild(noise)
    inputs = operator.select(workload, common | mild | profile.draw(noise, mild))
    return {name: x.detach().contiguous().requires_grad_(requires_grad) for name, x in inputs.items()}, d_output


def truth_of(operator: Operator, workload: Workload, inputs: Inputs, d_output: Tensor) -> tuple[Tensor, Inputs]:
    """The operator's output and the gradients of all its inputs, in float64, from the operator's definition.

    One sequence at a time, so that a batch costs no memory. Inputs [B, T, ...] are cut into sequences; others (a
    parameter of a head) are shared by them and collect the gradients of all.

    Args:
        operator: the operator.
        workload: what `inputs` were made for.
        inputs: by name, in any dtype; they are read in float64.
        d_output: gradient of the output [B, T, HV, V].

    Returns:
        The output [B, T, HV, V], and the gradients by input name.
    """
    leaves = {name: x.detach().double() for name, x in inputs.items()}
    by_token = {name for name, x in leaves.items() if x.shape[:2] == (workload.batch, workload.seq_len)}
    one_sequence = workload.with_(batch=1)
    outputs = []
    gradients: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for i in range(workload.batch):
        sequence = {name: (x[i : i + 1] if name in by_token else x).clone() for name, x in leaves.items()}
        for x in sequence.values():
            x.requires_grad_()
        output = operator.truth(one_sequence, sequence)
        grads = torch.autograd.grad(output, list(sequence.values()), d_output[i : i + 1].double())
        outputs.append(output.detach())
        for name, gradient in zip(sequence, grads):
            gradients[name].append(gradient)
    return torch.cat(outputs), {
        name: torch.cat(parts) if name in by_token else sum(parts) for name, parts in gradients.items()
    }
