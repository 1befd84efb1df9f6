"""Tunes the MDN kernels: each kernel of the forward and of the backward alone, then what they make together.

The kernels of a direction run one after the other, so the best of each are put together, and take the incumbent's place
when the whole direction is faster with them. The choice goes to the user's store (`mdnbench.kernels.store`).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdnbench.baselines.inputs import distinct_profiles, make_inputs
from mdnbench.baselines.mdn import OPERATOR
from mdnbench.baselines.provider import Inputs
from mdnbench.baselines.workload import BYTES_PER_ELEMENT, Workload
from mdnbench.kernels import backward, forward, store
from mdnbench.kernels.launch import Launch
from mdnbench.kernels.space import CONFIGS, SPACE, Shape, search_space, table_config
from mdnbench.kernels.versions import source_hash

from .compile_launches import launching, recorded
from .measure import open_graph
from .tune_check import first_fault
from .tune_compile import compile_launch
from .tune_interface import Progress, Settings, Tunable
from .tune_log import Candidate, Choice, Resources, TuneLog
from .tune_search import Runner, Search

DIRECTIONS = tuple(SPACE)
CHECKED_CHUNKS = 3  # and one token of a fourth, which is then not full
CHECKED_BATCH = 2
RUNNER_UPS_KEPT = 3
_TIMED_SEED = 0
# The kernel that the fields with a prefix configure.
_KERNELS = {"forward": {"prepare": "prepare_fwd_kernel", "scan": "scan_fwd_kernel"}}
_KERNELS["backward"] = {
    "attention": "prepare_fwd_kernel", **{it: f"{it}_bwd_kernel" for it in ("scan", "matrices", "states", "gradients")},
}  # fmt: skip
_NAMES = ("q", "k", "v", "log_alpha", "log_mu", "p", "beta", "eta")


@dataclass(frozen=True)
class MdnKernel(Tunable):
    """One kernel of a direction on one workload, or all of them.

    Attributes:
        workload: sizes and dtype; runs on its device, on a CPU in Triton's interpreter.
        direction: "forward" or "backward".
        kernel: a key of `SPACE[direction]`; None for all: the candidates are then `others` beside the base.
        gpu: what the code is compiled for.
        base: pairs (field, value) of the configuration that candidates differ from: the incumbent.
        forward_base, backward_base: the same of the forward that a backward starts from, and of the backward that what
            a forward keeps is checked with.
        others: further candidates, in place of the search space.
        profiles: gate profiles at which results are checked.
        folder: where float64 truths are kept for the next process; None for nowhere.
    """

    workload: Workload
    direction: str
    kernel: str | None
    gpu: store.Gpu
    base: tuple[tuple[str, Any], ...]
    forward_base: tuple[tuple[str, Any], ...]
    backward_base: tuple[tuple[str, Any], ...]
    others: tuple[tuple[tuple[str, Any], ...], ...] | None = None
    profiles: tuple[str, ...] = ()
    folder: str | None = None

    @property
    def name(self) -> str:
        return f"{self.direction} {self.kernel or 'all'} {self.workload.label()}"

    @property
    def device(self) -> str:
        return self.workload.device

    @property
    def shared_memory_bytes(self) -> int:
        return self.gpu.shared_memory_bytes

    @property
    def compiled_first(self) -> bool:
        return self.kernel is not None  # for all together the kernels of a training call have been

    @property
    def run_variables(self) -> dict[str, str | None]:
        return {"TRITON_INTERPRET": "1" if self.device == "cpu" else None}

    def candidates(self) -> Sequence[Candidate]:
        """See `Tunable`."""
        if self.others is not None:
            return [dict(self.base), *(dict(it) for it in self.others)]
        base = CONFIGS[self.direction](**dict(self.base))
        shape = shape_of(self.workload, self.gpu)
        return [asdict(it) for it in search_space(self.direction, self.kernel, shape, base)]

    def label(self, candidate: Candidate) -> str:
        """The fields of this kernel, or those that differ from the base."""
        base = dict(self.base)
        fields = SPACE[self.direction][self.kernel] if self.kernel else [n for n in base if base[n] != candidate[n]]
        return " ".join(f"{name}={candidate[name]}" for name in fields) or "as it was"

    def compile(self, candidate: Candidate) -> list[Resources]:
        """As the first call would: what it makes is in Triton's cache when that call comes."""
        w = self.workload
        meta = w.with_(seq_len=w.chunk_size, batch=CHECKED_BATCH)  # neither is compiled in
        inputs, d_output = make_inputs(OPERATOR, meta.with_(device="cpu"), _TIMED_SEED, requires_grad=False)
        inputs, d_output = {name: x.to("meta") for name, x in inputs.items()}, d_output.to("meta")
        with recorded():
            kept = self._kept_for_backward(inputs)
        with recorded() as launches:
            self._call(candidate, inputs, d_output, kept)
        wanted = self._wanted()
        capability = int(self.gpu.compute_capability.replace(".", ""))
        return [compile_launch(*launch, capability) for launch in launches if launch[0].__name__ in wanted]

    def warm_up(self) -> None:
        """Start CUDA."""
        if self.device != "cpu":
            torch.zeros(1, device=self.device)

    def run(self, candidate: Candidate) -> Callable[[], object]:
        """The whole direction, or the launch of one kernel as it happens there."""
        inputs, d_output = _timed_inputs(self.workload)
        call = functools.partial(self._call, candidate, inputs, d_output, self._kept_for_backward(inputs))
        if self.kernel is not None:
            with _noted() as launches:
                call()
            wanted = [it for it in launches if it[0].kernel.__name__ in self._wanted()]
            call = functools.partial(_repeat, wanted)
        # Replayed from a graph on a GPU, so that the host's share is in no sample.
        return call if self.device == "cpu" else open_graph(call, "forward", [], d_output)

    def check(self, candidate: Candidate) -> str | None:
        """See `first_fault`."""
        w = self.workload
        short = w.with_(seq_len=CHECKED_CHUNKS * w.chunk_size + 1, batch=CHECKED_BATCH)

        whole_forward = self.direction == "forward" and self.kernel is None

        def prepare(inputs: Inputs, d_output: Tensor) -> Callable[[], dict[str, Tensor]]:
            if whole_forward:
                return functools.partial(self._both, candidate, inputs, d_output)
            return functools.partial(self._call, candidate, inputs, d_output, self._kept_for_backward(inputs))

        def prepare_inference(inputs: Inputs, d_output: Tensor) -> Callable[[], dict[str, Tensor]]:
            return lambda: {"o": self._forward(inputs, candidate, keep_errors=False).o}

        fault = first_fault(OPERATOR, short, self.profiles, prepare, self.folder)
        if fault is None and whole_forward:  # which serves calls without gradients too: the scan is other code there
            fault = first_fault(OPERATOR, short, self.profiles, prepare_inference, self.folder)
        return fault

    def _wanted(self) -> tuple[str, ...]:
        kernels = _KERNELS[self.direction]
        return (kernels[self.kernel],) if self.kernel else tuple(kernels.values())

    def _call(
        self, candidate: Candidate, inputs: Inputs, d_output: Tensor, kept: forward.Forward | None
    ) -> dict[str, Tensor]:
        """Results by name: of the forward "o", of the backward the gradients."""
        if self.direction == "forward":
            return {"o": self._forward(inputs, candidate).o}
        return self._backward(candidate, inputs, d_output, kept)

    def _both(self, candidate: Candidate, inputs: Inputs, d_output: Tensor) -> dict[str, Tensor]:
        """As `_call` of the forward, with the gradients: right only where what is kept for the backward is."""
        kept = self._forward(inputs, candidate)
        return {"o": kept.o, **self._backward(dict(self.backward_base), inputs, d_output, kept)}

    def _kept_for_backward(self, inputs: Inputs) -> forward.Forward | None:
        return self._forward(inputs) if self.direction == "backward" else None

    def _common(self, inputs: Inputs) -> dict[str, Any]:
        """Arguments of both directions: as a layer calls them."""
        return {
            **{name: inputs.get(name) for name in _NAMES}, "scale": None, "initial_state": None, "cu_seqlens": None,
            "use_qk_l2norm_in_kernel": True, "use_p_times_alpha": True, "chunk_size": self.workload.chunk_size,
        }  # fmt: skip

    def _forward(self, inputs: Inputs, candidate: Candidate | None = None, keep_errors: bool = True) -> forward.Forward:
        config = CONFIGS["forward"](**(candidate or dict(self.forward_base)))
        return forward.chunk_forward(
            **self._common(inputs), output_final_state=False, config=config, keep_errors=keep_errors
        )

    def _backward(
        self, candidate: Candidate, inputs: Inputs, d_output: Tensor, kept: forward.Forward
    ) -> dict[str, Tensor]:
        grads = backward.chunk_backward(
            **self._common(inputs), inverse=kept.inverse, coefficients=kept.coefficients, low=kept.low,
            errors=kept.errors, o=kept.o, do=d_output, dfinal_state=None,
            wanted=[*(name in inputs for name in _NAMES), False], config=CONFIGS["backward"](**candidate),
        )  # fmt: skip
        return {f"d{name}": x for name, x in zip(_NAMES, grads) if x is not None}


@contextmanager
def _noted() -> Iterator[list[tuple[Launch, tuple[Tensor | None, ...]]]]:
    """The launches made meanwhile, which run, and their tensors: to be made again."""
    launches: list[tuple[Launch, tuple[Tensor | None, ...]]] = []
    call = Launch.__call__

    def run_and_note(launch: Launch, *tensors: Tensor | None) -> None:
        launches.append((launch, tensors))
        call(launch, *tensors)

    with launching(run_and_note):
        yield launches


def _repeat(launches: Sequence[tuple[Launch, tuple[Tensor | None, ...]]]) -> None:
    for launch, tensors in launches:
        launch(*tensors)


@functools.lru_cache(maxsize=1)  # all candidates of a workload are timed on the same
def _timed_inputs(workload: Workload) -> tuple[Inputs, Tensor]:
    return make_inputs(OPERATOR, workload, _TIMED_SEED, requires_grad=False)


def shape_of(workload: Workload, gpu: store.Gpu) -> Shape:
    """What decides which configurations are valid."""
    w = workload
    return Shape(
        w.head_dim_k, w.head_dim_v, w.chunk_size, BYTES_PER_ELEMENT[w.dtype], w.batch * w.value_heads, False,
        gpu.shared_memory_bytes, gpu.multiprocessors,
    )  # fmt: skip


def key_of(workload: Workload, direction: str) -> store.Key:
    """What an entry of the store for a workload is for."""
    w = workload
    return store.Key(
        direction, w.dtype, w.head_dim_k, w.head_dim_v, w.chunk_size, False, store.bucket(w.batch * w.value_heads),
        store.bucket(w.seq_len),
    )  # fmt: skip


def in_use(workload: Workload, direction: str, gpu: store.Gpu) -> tuple[Candidate, str, store.Entry | None]:
    """The configuration that a layer's call would use, where it comes from in words, and its entry."""
    entry, notice = store.look_up(key_of(workload, direction), gpu)
    remark = "" if notice is None else f" ({notice})"
    if entry is None:
        return asdict(table_config(direction, shape_of(workload, gpu))), f"table of config.py{remark}", None
    return dict(entry.config), f"{entry.place}, {entry.source}{remark}", entry


def kernels_of(
    workload: Workload, gpu: store.Gpu, incumbents: Mapping[str, Candidate], profiles: Sequence[str] | None = None
) -> list[MdnKernel]:
    """Every kernel of both directions as a tunable.

    Args:
        workload, gpu: what is tuned, and for what.
        incumbents: the configuration of each direction that others have to beat.
        profiles: gate profiles at which results are checked; None means all.
    """
    incumbent = {direction: tuple(config.items()) for direction, config in incumbents.items()}
    profiles = tuple(distinct_profiles(OPERATOR) if profiles is None else profiles)
    bases = (incumbent["forward"], incumbent.get("backward", ()))
    return [
        MdnKernel(workload, direction, kernel, gpu, incumbent[direction], *bases, profiles=profiles)
        for direction in DIRECTIONS
        for kernel in SPACE[direction]
    ]


def together(kernels: Sequence[MdnKernel], choices: Sequence[Choice]) -> list[MdnKernel]:
    """Each direction as a whole, with the choices of its kernels put together, and what came second, as candidates."""
    chosen = {choice.tunable: choice for choice in choices}
    wholes = []
    for direction in dict.fromkeys(it.direction for it in kernels):
        parts = [it for it in kernels if it.direction == direction]
        best = dict(parts[0].base)
        for part in parts:
            if part.name in chosen:
                best |= {field: chosen[part.name].candidate[field] for field in SPACE[direction][part.kernel]}
        others = [] if best == dict(parts[0].base) else [best]
        for part in parts:
            for second in chosen[part.name].runner_ups[:1] if part.name in chosen else ():
                other = best | {field: second[field] for field in SPACE[direction][part.kernel]}
                if other not in others and other != dict(parts[0].base):
                    others.append(other)
        wholes.append(replace(parts[0], kernel=None, others=tuple(tuple(it.items()) for it in others)))
    return wholes


def tune(
    workload: Workload,
    gpu: store.Gpu,
    log: TuneLog,
    settings: Settings,
    watch: Callable[[Progress], None],
    select: Callable[[list[MdnKernel]], list[MdnKernel]] = list,
    profiles: Sequence[str] | None = None,
) -> list[Choice]:
    """Search for one workload and keep what is chosen in the user's store.

    Args:
        workload, gpu: what is tuned, and where.
        log: keeps the candidates, and the incumbents that the search began with.
        settings, watch: as of `Search`.
        select: of the kernels, those to tune.
        profiles: as in `kernels_of`.

    Returns:
        A choice a direction, its tunable named "forward all ..." or "backward all ...". None for a direction in which
        nothing is right, nor where the time was over before there was anything to compare with the incumbent.
    """
    incumbents = log.incumbents(workload.label(), {it: in_use(workload, it, gpu)[0] for it in DIRECTIONS})
    with tempfile.TemporaryDirectory(prefix="mdnbench-truth-") as folder:
        kernels = [replace(it, folder=folder) for it in select(kernels_of(workload, gpu, incumbents, profiles))]
        runner = Runner(log, settings.spare)
        alone = settings if settings.seconds is None else replace(settings, seconds=0.8 * settings.seconds)
        settings = replace(settings, seconds=None)  # a few candidates, already compiled: seconds
        try:
            wholes = together(kernels, Search(kernels, log, alone, watch, runner).run())
            wholes = [it for it in wholes if it.others or not unfinished(log, workload, it.direction)]
            found = {choice.tunable: choice for choice in Search(wholes, log, settings, watch, runner).run()}
        finally:
            runner.stop()
    versions = store.installed_versions(gpu.compute_capability)
    entries = []
    for whole in wholes:
        if whole.name in found:
            choice, key = found[whole.name], key_of(workload, whole.direction)
            latency, runner_ups = choice.latency_ms, choice.runner_ups[:RUNNER_UPS_KEPT]
            entries.append(store.Entry(key, choice.candidate, store.TUNED, versions, latency, runner_ups))
    if entries:
        store.write(store.user_folder(), gpu, entries)
    return list(found.values())


def open_log(folder: Path, gpu: store.Gpu, resume: bool) -> TuneLog:
    """The log of searches on a GPU with what is installed. Raises ValueError as `TuneLog`."""
    versions = store.installed_versions(gpu.compute_capability)._asdict()
    return TuneLog(folder, {"operator": OPERATOR.name, "gpu": gpu._asdict(), "versions": versions}, resume)


def unfinished(log: TuneLog, workload: Workload, direction: str) -> bool:
    """Whether the time was over before all candidates of the kernels of a direction were tried."""
    names = [f"{direction} {kernel} {workload.label()}" for kernel in SPACE[direction]]
    return any(it.tunable in names and it.stage != "done" for it in log.trials.values())


def verify(
    workload: Workload, gpu: store.Gpu, log: TuneLog, settings: Settings, watch: Callable[[Progress], None]
) -> list[Choice]:
    """Check what is in use once more and time it against its runner-ups and the table of config.py; store nothing.

    Returns:
        A choice a direction whose `ratio` is the time of the fastest over that of what is in use; none for a direction
        in which nothing is right.
    """
    wholes = []
    incumbents = log.incumbents(workload.label(), {it: in_use(workload, it, gpu)[0] for it in DIRECTIONS})
    for whole in together(kernels_of(workload, gpu, incumbents), []):
        entry = in_use(workload, whole.direction, gpu)[2]
        table = asdict(table_config(whole.direction, shape_of(workload, gpu)))
        others = [it for it in (*(entry.runner_ups if entry else ()), table) if it != dict(whole.base)]
        wholes.append(replace(whole, others=tuple(tuple(it.items()) for it in others)))
    with tempfile.TemporaryDirectory(prefix="mdnbench-truth-") as folder:
        return Search([replace(it, folder=folder) for it in wholes], log, settings, watch).run()


def hand_chosen(workload: Workload, gpu: store.Gpu) -> list[store.Entry]:
    """The choices of the table of config.py as entries, without times."""
    return [
        store.Entry(key_of(workload, it), asdict(table_config(it, shape_of(workload, gpu))), store.HAND_CHOSEN)
        for it in DIRECTIONS
    ]


def known_gpus(device: str | None) -> list[store.Gpu]:
    """The GPU of a device, "cuda" or "cuda:N"; for None those that entries are stored for."""
    if device is not None:
        return [store.gpu_of(torch.device(device).index or 0)]
    files = [path for folder in (store.SHIPPED_FOLDER, store.user_folder()) for path in sorted(folder.glob("*.json"))]
    return list({found[0].name: found[0] for found in map(store.read_if_right, files) if found}.values())


def export(gpu: store.Gpu, workloads: Sequence[Workload], folder: Path | None = None) -> tuple[Path, int]:
    """Copy the user's entries for a GPU to a folder, None for the shipped ones, with those of the table for `workloads`
    that have none, without those of other kernels' code. Returns the file and how many of its entries are tuned."""
    folder = folder or store.SHIPPED_FOLDER
    _, tuned = store.read_if_right(store.file_of(store.user_folder(), gpu.name)) or (None, [])
    of_the_table = (entry for workload in workloads for entry in hand_chosen(workload, gpu))
    path = store.write(folder, gpu, [*of_the_table, *tuned], kernels=source_hash())
    return path, sum(entry.source == store.TUNED for entry in store.read(path)[1])
