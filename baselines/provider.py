"""The interface between the suite and the code it judges: operators (the mathematics) and providers (the code)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .workload import DEVICES, DTYPES, Workload

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_POINT_GROUP = "mdnbench.providers"  # under which other packages register their providers

Inputs = dict[str, "Tensor"]


@dataclass(frozen=True)
class Operator:
    """One mathematical operator, with the float64 truth that every provider of it is checked against.

    Attributes:
        name: short name, such as "gdn".
        title: name for tables and plots, such as "Gated DeltaNet".
        gates: the gates of a gate profile that this operator reads.
        select: maps (workload, common inputs) to this operator's own inputs by name. The common inputs are
            q, k [B, T, H, K], v [B, T, HV, V] in the workload's dtype and the profile's gates
            log_alpha, log_mu, beta, eta [B, T, HV] in float32. Raises ValueError with one sentence where the operator
            cannot express the gate profile.
        truth: (workload, float64 inputs) -> output [B, T, HV, V] float64: the definition, token by token where the
            operator is a recurrence; differentiable by autograd.
    """

    name: str
    title: str
    gates: tuple[str, ...]
    select: Callable[[Workload, Inputs], Inputs]
    truth: Callable[[Workload, Inputs], Tensor]


class Provider:
    """Code that can run one operator. Subclass it, set the class attributes and write `build`.

    Attributes:
        name: unique, `<operator>-<package or backend>`.
        operator: the operator it computes.
        package: import name of the package it wraps, None when nothing beyond mdnbench is needed.
        install: the command that installs that package.
        devices, dtypes: what it runs on.
        chunk_sizes: the chunk sizes it can use; None when it has no such parameter.
        modes: the modes it can run, of "forward", "backward", "forward_backward".
        cuda_graph: whether its calls may be captured in a CUDA graph.
    """

    name: ClassVar[str]
    operator: ClassVar[Operator]
    package: ClassVar[str | None] = None
    install: ClassVar[str | None] = None
    devices: ClassVar[tuple[str, ...]] = DEVICES
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    chunk_sizes: ClassVar[tuple[int, ...] | None] = None
    modes: ClassVar[tuple[str, ...]] = ("forward", "backward", "forward_backward")
    cuda_graph: ClassVar[bool] = True

    def supports(self, workload: Workload, mode: str = "forward") -> str | None:
        """None when the workload can run here, else the reason in one sentence.

        Subclasses add their own conditions in `_supports`, which is asked last. Never raises, imports nothing heavy
        beyond torch.
        """
        from .inputs import refused_gates  # here, so that importing the interface loads no torch

        if self.package is not None and not _is_installed(self.package):
            return f"the package {self.package} is not installed: {self.install}"
        if workload.device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only, not on {workload.device}"
        if workload.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)} only, not {workload.dtype}"
        if mode not in self.modes:
            return f"has no {mode.replace('_', ' + ')}: it offers {', '.join(self.modes)} only"
        if self.chunk_sizes is not None and workload.chunk_size not in self.chunk_sizes:
            return f"takes chunk sizes {', '.join(map(str, self.chunk_sizes))} only, not {workload.chunk_size}"
        try:
            return refused_gates(self.operator, workload.gates) or self._supports(workload, mode)
        except Exception as error:  # a third party's fault: a reason, not the end of a sweep
            return f"its own check failed: {type(error).__name__}: {error}"

    def _supports(self, workload: Workload, mode: str) -> str | None:
        """Further conditions of a subclass: None, or the reason in one sentence."""
        return None

    def build(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """A function of no arguments that computes the output [B, T, HV, V] from `inputs`, in the workload's dtype.

        `inputs` are leaves (with requires_grad set when a backward pass will follow); what the returned function does
        is what is timed, so constant set-up belongs here, outside of it. The output is connected to every input by
        autograd when `modes` has a backward.
        """
        raise NotImplementedError


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # the parent of a dotted name is missing, or the module has no spec
        return False
