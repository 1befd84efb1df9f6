"""The interface between the suite and the code it judges: operators (the mathematics) and providers (the code)."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .workload import BYTES_PER_ELEMENT, DEVICES, DTYPES, Workload

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
        forward_flops: the floating-point operations of its forward pass on a workload (see `flops`); None where no
            count is known.
        gate_bytes: the bytes of its inputs beside q, k and v; None means one float32 [B, T, HV] for each of `gates`.
    """

    name: str
    title: str
    gates: tuple[str, ...]
    select: Callable[[Workload, Inputs], Inputs]
    truth: Callable[[Workload, Inputs], Tensor]
    forward_flops: Callable[[Workload], int | None] | None = None
    gate_bytes: Callable[[Workload], int] | None = None

    def flops(self, workload: Workload, mode: str) -> int | None:
        """Floating-point operations of the matrix products of the chunk form at the workload's chunk size.

        A product of [m, k] and [k, n] counts 2 m k n, as tensor cores compute it: triangles inside a chunk count as
        squares, a triangular solve as the product with the inverse. Not counted: the inverse itself, elementwise work,
        and what a backward pass computes again. Each product of the forward pass has two in the backward pass, one for
        the gradient of either factor.

        Args:
            workload: its chunk size decides; None has no count where the operator has chunks.
            mode: "forward", "backward" or "forward_backward".

        Returns:
            None where no count is known.
        """
        if self.forward_flops is None:
            return None
        forward = self.forward_flops(workload)
        return None if forward is None else forward * {"forward": 1, "backward": 2, "forward_backward": 3}[mode]

    def bytes(self, workload: Workload, mode: str) -> int:
        """Bytes that any implementation moves at least: each input and output once, whatever the chunk size.

        Forward reads the inputs I and writes the output O; backward reads I and the gradient of O, and writes the
        gradients of I: I + O, 2 I + O and, together, 3 I + 2 O.
        """
        size = BYTES_PER_ELEMENT[workload.dtype]
        output = workload.tokens * workload.value_heads * workload.head_dim_v * size
        inputs = 2 * workload.tokens * workload.heads * workload.head_dim_k * size + output
        if self.gate_bytes is None:
            inputs += len(self.gates) * workload.tokens * workload.value_heads * BYTES_PER_ELEMENT["float32"]
        else:
            inputs += self.gate_bytes(workload)
        reads, writes = {"forward": (1, 1), "backward": (2, 1), "forward_backward": (3, 2)}[mode]
        return reads * inputs + writes * output


class Provider:
    """Code that can run one operator. Subclass it, set the class attributes and write `build`.

    Attributes:
        name: unique, `<operator>-<package or backend>`.
        operator: the operator it computes.
        package: import name of the package or module it wraps, None when nothing beyond mdnbench is needed.
        install: the command that installs that package.
        devices, dtypes: what it runs on.
        chunk_sizes: the chunk sizes it can use; None when it has no such parameter.
        built_in_chunk_size: that of a provider without such a parameter whose operator has chunks, for `flops`.
        head_dims: the pairs (head_dim_k, head_dim_v) it can use, where these are few; None means no such list.
        modes: the modes it can run, of "forward", "backward", "forward_backward".
        cuda_graph: whether its calls may be captured in a CUDA graph.
        shares_process: False where building it changes what other providers import: it gets a process of its own.
    """

    name: ClassVar[str]
    operator: ClassVar[Operator]
    package: ClassVar[str | None] = None
    install: ClassVar[str | None] = None
    devices: ClassVar[tuple[str, ...]] = DEVICES
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    chunk_sizes: ClassVar[tuple[int, ...] | None] = None
    built_in_chunk_size: ClassVar[int | None] = None
    head_dims: ClassVar[tuple[tuple[int, int], ...] | None] = None
    modes: ClassVar[tuple[str, ...]] = ("forward", "backward", "forward_backward")
    cuda_graph: ClassVar[bool] = True
    shares_process: ClassVar[bool] = True

    def supports(self, workload: Workload, mode: str = "forward") -> str | None:
        """None when the workload can run here, else the reason in one sentence.

        Subclasses add their own conditions in `_supports`, which is asked last. Never raises, imports nothing heavy
        beyond torch.
        """
        from .inputs import refused_gates  # here, so that importing the interface loads no torch

        missing = self.missing()
        if missing is not None:
            return missing
        if workload.device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only, not on {workload.device}"
        if workload.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)} only, not {workload.dtype}"
        if mode not in self.modes:
            return f"has no {mode.replace('_', ' + ')}: it offers {', '.join(self.modes)} only"
        if self.chunk_sizes is not None and workload.chunk_size not in self.chunk_sizes:
            return f"takes chunk sizes {', '.join(map(str, self.chunk_sizes))} only, not {workload.chunk_size}"
        head_dims = (workload.head_dim_k, workload.head_dim_v)
        if self.head_dims is not None and head_dims not in self.head_dims:
            known = ", ".join(f"K {k} V {v}" for k, v in self.head_dims)
            return f"takes head dimensions {known} only, not K {head_dims[0]} V {head_dims[1]}"
        try:
            return refused_gates(self.operator, workload.gates) or self._supports(workload, mode)
        except Exception as error:  # a third party's fault: a reason, not the end of a sweep
            return f"its own check failed: {type(error).__name__}: {error}"

    def missing(self) -> str | None:
        """What has to be installed first and how, in one sentence; None where all is there."""
        if self.package is None or _is_installed(self.package):
            return None
        return f"the package {self.package} is not installed: {self.install}"

    def flops(self, workload: Workload, mode: str) -> int | None:
        """As `Operator.flops`, with the chunk size that is built in where the workload has none."""
        if workload.chunk_size is None:
            workload = workload.with_(chunk_size=self.built_in_chunk_size)
        return self.operator.flops(workload, mode)

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

    def notes(self, workload: Workload, mode: str) -> tuple[str, ...]:
        """What a reader of this provider's rows must know beside the numbers, a sentence each; asked after `build`."""
        return ()


def _is_installed(package: str) -> bool:
    """Whether a module can be found, without importing anything: to import the parents of a dotted name takes long."""
    top, *parts = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for part in parts:
            if spec is None or spec.submodule_search_locations is None:
                return False
            spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    except (ImportError, ValueError):  # it is in sys.modules without a spec
        return False
    return spec is not None
