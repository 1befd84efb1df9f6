"""Checks a candidate of an operator against its float64 definition, at every gate profile asked for."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mdnbench.baselines.inputs import make_inputs, truth_of
from mdnbench.baselines.provider import Inputs, Operator
from mdnbench.baselines.workload import Workload

from .correctness import poisoned_memory
from .metrics import tolerance

Call = Callable[[], dict[str, Tensor]]

_SEED = 1  # timed inputs have another


def first_fault(
    operator: Operator,
    workload: Workload,
    profiles: Sequence[str],
    prepare: Callable[[Inputs, Tensor], Call],
    folder: str | None = None,
) -> str | None:
    """One sentence on the first result that is wrong, or not the same bits when computed again; None without one.

    Args:
        operator: gives inputs and the truth.
        workload: what is checked, on its device.
        profiles: names of gate profiles.
        prepare: from inputs and the gradient of the output to the call that gives results: "o", or gradients as "dq".
            Memory that the call takes and does not write holds NaN.
        folder: where truths are kept for other processes; None for nowhere.
    """
    for profile in profiles:
        here = workload.with_(gates=profile)
        truth = _truth(operator, here, folder)
        inputs, d_output = make_inputs(operator, here, _SEED, requires_grad=False)
        call = prepare(inputs, d_output)
        with poisoned_memory(d_output.shape, d_output.dtype, torch.device(here.device)):
            first, second = call(), call()
        for name, error in _errors(first, truth).items():
            if not math.isfinite(error):
                return f"{name} holds NaN or infinity at {profile}"
            allowed = tolerance(here.dtype, name)
            if error > allowed:
                return f"{name} has a relative error of {error:.2g} at {profile}, {allowed:g} is allowed"
        for name, x in first.items():
            if not torch.equal(x, second[name]):
                return f"{name} differs between two calls on the same inputs at {profile}"
    return None


def _errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """||x - truth|| / ||truth|| by name, ||x|| where the truth is zero; read from the device at once."""
    errors = []
    for name, x in results.items():
        expected = truth[name].double()
        scale = expected.norm()
        errors.append((x.double() - expected).norm() / torch.where(scale > 0, scale, torch.ones_like(scale)))
    return dict(zip(results, torch.stack(errors).tolist()))


@functools.lru_cache(maxsize=32)
def _truth(operator: Operator, workload: Workload, folder: str | None) -> dict[str, Tensor]:
    """Output and gradients by name, computed in float64 and kept in float32, in `folder` for other processes too."""
    path = folder and Path(folder) / f"{re.sub(r'[^A-Za-z0-9.=-]+', '-', workload.label())}.pt"
    if path and path.exists():
        return torch.load(path, map_location=workload.device, weights_only=True)
    inputs, d_output = make_inputs(operator, workload, _SEED, requires_grad=False)
    output, grads = truth_of(operator, workload, inputs, d_output)
    found = {name: x.float() for name, x in {"o": output, **{f"d{n}": x for n, x in grads.items()}}.items()}
    if path:
        temporary = path.with_suffix(".part")
        torch.save(found, temporary)
        temporary.replace(path)
    return found
