"""Gate profiles and inputs for the tests of the operator; a table of their own, so that they need no other folder."""

import math

import pytest
import torch
from torch.nn.functional import softplus

pytest.register_assert_rewrite("kernel_cases")


def _gates(normal, uniform, **changes):
    """The mild profile with some gates changed; a change is a number or a tensor."""
    gates = {
        "log_alpha": -0.1 * softplus(normal()),
        "log_mu": -0.5 * softplus(normal()),
        "beta": uniform(),
        "eta": 2 * uniform(),
    }
    gates.update({name: torch.as_tensor(value).expand_as(gates["beta"]).clone() for name, value in changes.items()})
    return gates


def _layer(normal, uniform):
    """The layer of the paper with its parameters as initialised: A in [1, 16], dt log-uniform in [1e-3, 0.1]."""
    decay = 1 + 15 * uniform()[:, :1]
    dt = torch.exp(math.log(1e-3) + uniform()[:, :1] * math.log(100))
    eta = 1 + torch.tanh(normal() / 2)
    theta = torch.atan(eta)
    return {
        "log_alpha": 2 * theta.cos().log() - decay * softplus(normal() + torch.log(torch.expm1(dt))),
        "log_mu": (-softplus(normal())).clamp(min=-2),
        "beta": theta.sin().square() * torch.sigmoid(normal()),
        "eta": eta,
    }


def _where(uniform, probability, yes, no):
    return torch.where(uniform() < probability, yes, no)


PROFILES = {
    "mild": lambda n, u: _gates(n, u),
    "mu_one": lambda n, u: _gates(n, u, log_mu=0.0),
    "log_mu_-1": lambda n, u: _gates(n, u, log_mu=-1.0),
    "log_mu_-2": lambda n, u: _gates(n, u, log_mu=-2.0),
    "log_mu_-8": lambda n, u: _gates(n, u, log_mu=-8.0),
    "mu_zero": lambda n, u: _gates(n, u, log_mu=-math.inf),
    "log_mu_0_or_-2": lambda n, u: _gates(n, u, log_mu=_where(u, 0.5, 0.0, -2.0)),
    "log_alpha_-5": lambda n, u: _gates(n, u, log_alpha=-5.0),
    "resets_-20": lambda n, u: _gates(n, u, log_alpha=_where(u, 0.1, -20.0, -0.1 * softplus(n()))),
    "resets_-inf": lambda n, u: _gates(n, u, log_alpha=_where(u, 0.1, -math.inf, -0.1 * softplus(n()))),
    "alpha_one": lambda n, u: _gates(n, u, log_alpha=0.0),
    "beta_zero": lambda n, u: _gates(n, u, beta=0.0),
    "beta_1e-5": lambda n, u: _gates(n, u, beta=1e-5),
    "beta_one": lambda n, u: _gates(n, u, beta=1.0),
    "eta_two": lambda n, u: _gates(n, u, eta=2.0),
    "layer": _layer,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The matrices here are too small for threads to help, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=PROFILES)
def profile(request):
    """The name of a gate profile: every one in turn."""
    return request.param


@pytest.fixture
def make_inputs():
    """A function that makes q, k, v, p, the gates and an initial state, seeded, as leaves that require gradients."""

    def make(profile="mild", B=1, T=70, H=2, HV=4, K=16, V=24, N=None, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape or (B, T, HV), generator=generator, dtype=torch.float64)

        def uniform():
            return torch.rand((B, T, HV), generator=generator, dtype=torch.float64)

        inputs = {
            "q": normal(B, T, H, K),
            "k": normal(B, T, H, K),
            "v": normal(B, T, HV, V),
            "p": normal(B, T, H, K),
            **PROFILES[profile](normal, uniform),
            "initial_state": normal(2, N or B, HV, K, V),
        }
        return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}

    return make


@pytest.fixture
def evaluate():
    """A function that gives o, the final state and all gradients, for fixed gradients arriving at both of the former.

    `function` is called with the inputs in `dtype` (None: as they are) and `options`. Gradients arrive at those of o
    and the final state that `arriving` names, rounded to the dtype of q, and those of the inputs that `wanted` names
    (None: all) are computed; zeros for what none reaches.
    """

    def run(function, inputs, dtype=None, arriving=("o", "final_state"), wanted=None, **options):
        inputs = {name: x.detach() for name, x in inputs.items() if x is not None}
        arguments = {name: x.to(dtype or x.dtype) for name, x in inputs.items()}
        leaves = {name: arguments[name].requires_grad_() for name in wanted or inputs}
        results = dict(zip(("o", "final_state"), function(**arguments, **{"output_final_state": True, **options})))
        generator = torch.Generator().manual_seed(1)
        upstream = {
            name: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(inputs["q"].dtype).to(x)
            for name, x in results.items()
            if x is not None
        }
        ends, starts = [results[name] for name in arriving], [upstream[name] for name in arriving]
        grads = torch.autograd.grad(ends, list(leaves.values()), starts, allow_unused=True, materialize_grads=True)
        results = {name: results[name].detach() for name in upstream}
        return {**results, **{f"d{name}": grad for name, grad in zip(leaves, grads)}}

    return run


@pytest.fixture
def assert_close():
    """A function that compares results of `evaluate` by relative norm, and by size where the true value is 0."""

    def check(computed, true, value_error=1e-5, gradient_error=1e-4, zero_error=1e-6, log_gate_error=None):
        assert computed.keys() == true.keys()
        limits = dict.fromkeys(true, gradient_error) | dict.fromkeys(("o", "final_state"), value_error)
        if log_gate_error is not None:
            limits |= dict.fromkeys(("dlog_alpha", "dlog_mu"), log_gate_error)
        for name, expected in true.items():
            got, expected = computed[name].double(), expected.double()
            assert got.shape == expected.shape, name
            assert got.isfinite().all(), f"{name} is not finite"
            zeros = got[expected == 0].abs().max().item() if (expected == 0).any() else 0.0
            assert zeros <= zero_error, f"{name}: {zeros:.1e} where the true value is 0"
            norm = expected.norm()
            error = ((got - expected).norm() / norm).item() if norm > 0 else 0.0
            assert error <= limits[name], f"{name}: relative error {error:.1e}, limit {limits[name]:.0e}"

    return check
