"""Compiles what the operators would launch on a GPU that is not here, and says what the code needs.

A process of its own, because Triton decides at import whether it interprets:

    echo '[{"form": "chunk", "dtype": "bfloat16", "B": 4, "T": 4096, "H": 16, "HV": 16, "K": 128, "V": 128}]' \
        | python -m mdnbench.bench.compile_launches

A case is the arguments of `launches_of`. Each launch gives one line with the JSON object of `figures_of`. Cases may be
an object too, by names, which their launches then have as `case`; one that the operator refuses on this GPU gives a
line with the reason as `unsupported`. Where a launch does not compile, the process ends with the compiler's message.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mdnbench.kernels import backward, forward, recurrent
from mdnbench.kernels.config import BackwardConfig, KernelConfig, choose_backward_config, choose_config
from mdnbench.kernels.launch import Launch

from .code_figures import TARGETS, count_ptx, count_sass, programs_per_multiprocessor

Recorded = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, options

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@contextmanager
def launching(call: Callable[..., None]) -> Iterator[None]:
    """Meanwhile `call(launch, *tensors)` is what a launch does."""
    before = Launch.__call__
    Launch.__call__ = call
    try:
        yield
    finally:
        Launch.__call__ = before


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """The launches that the operators make meanwhile, which then run nothing."""
    launches: list[Recorded] = []

    def record(launch: Launch, *tensors: torch.Tensor | None) -> None:
        launches.append((launch.kernel, (*tensors, *launch.numbers), {**launch.constants, **launch.options}))

    with launching(record):
        yield launches


def launches_of(
    form: str,
    dtype: str,
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    capability: int = 90,
    free_p: bool = False,
    packed: bool = False,
    states: bool = True,
    chunk_size: int = 64,
    config: dict[str, int | None] | None = None,
    training: bool = False,
) -> list[Recorded]:
    """Every launch of a pass, from tensors without memory.

    Args:
        form: "chunk", "backward" (of the chunk form, of every gradient) or "recurrent".
        dtype: of q, k, v and p, by name.
        B, T, H, HV, K, V: sizes as in `chunk_momentum_delta_rule`.
        capability: compute capability times ten of a target in `code_figures.TARGETS`.
        free_p: whether p is given.
        packed: whether B sequences are packed into one batch of T tokens.
        states: whether there is an initial state, and the final one is returned.
        chunk_size: of the chunk form.
        config: fields of the configuration of a "chunk" or "backward", in place of the table's.
        training: whether a "chunk" is that of a training call, which keeps the errors for the backward.
    """
    element = getattr(torch, dtype)
    cu_seqlens = torch.empty(B + 1, dtype=torch.int64, device="meta") if packed else None
    N, B = B, 1 if packed else B
    q = torch.empty(B, T, H, K, dtype=element, device="meta")
    gate = torch.empty(B, T, HV, device="meta")
    v = torch.empty(B, T, HV, V, dtype=element, device="meta")
    state = torch.empty(2, N, HV, K, V, device="meta") if states else None
    p = q if free_p else None
    arguments = [q, q, v, gate, gate, p, gate, gate, None, state, states, cu_seqlens, True, True]
    target = TARGETS[f"sm_{capability}"]
    shape = (K, V, chunk_size, element.itemsize, N * HV, free_p, target.program_shared_bytes, target.multiprocessors)
    with recorded() as launches:
        if form == "recurrent":
            recurrent.recurrent_forward(*arguments)
        elif form == "chunk":
            chosen = choose_config(*shape) if config is None else KernelConfig(**config)
            forward.chunk_forward(*arguments, chunk_size, config=chosen, keep_errors=training)
        else:
            with recorded():
                kept = forward.chunk_forward(*arguments, chunk_size, config=choose_config(*shape), keep_errors=True)
            del arguments[10]
            chosen = choose_backward_config(*shape) if config is None else BackwardConfig(**config)
            backward.chunk_backward(
                *arguments, chunk_size, kept.inverse, kept.coefficients, kept.low, kept.errors, kept.o, kept.o,
                kept.final_state, [True] * 5 + [free_p, True, True, states], config=chosen,
            )  # fmt: skip
    return launches


def compiled(launch: Recorded, capability: int) -> Any:
    """A launch as Triton compiles it when its pointers are multiples of 16."""
    kernel, args, options = launch
    names = kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    options = {name: value for name, value in options.items() if name not in names}
    signature = dict.fromkeys(names, "constexpr")
    for name, value in zip(names, args):
        if value is None:
            constants[name] = None
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def figures_of(launch: Recorded, capability: int) -> dict[str, Any]:
    """What the code of a launch needs.

    Returns:
        kernel; constants (compile-time values by name), num_warps, num_stages, max_registers; registers (a thread),
        stack_bytes (a thread, spills), shared_bytes (a program), programs_per_multiprocessor; ptx and sass,
        instructions by class (`code_figures.CLASSES`); code_bytes; vector_loads (of 16 bytes, in the PTX).
    """
    kernel, _, options = launch
    code = compiled(launch, capability)
    ptx, metadata = code.asm["ptx"], code.metadata
    listing = _listing(code.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", listing).groups())
    sass, code_bytes = count_sass(listing)
    return {
        "kernel": kernel.__name__,
        "constants": {name: _plain(value) for name, value in sorted(options.items()) if name in kernel.arg_names},
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "max_registers": options.get("maxnreg"),
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": metadata.shared,
        "programs_per_multiprocessor": programs_per_multiprocessor(
            TARGETS[f"sm_{capability}"], registers, metadata.shared, metadata.num_warps
        ),
        "ptx": count_ptx(ptx),
        "sass": sass,
        "code_bytes": code_bytes,
        "vector_loads": ptx.count("ld.global.v4.b32"),
    }


@functools.lru_cache(maxsize=64)  # cases share kernels
def _listing(cubin: bytes) -> str:
    """The machine code as text, and what it uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def _plain(value: Any) -> Any:
    """For JSON: a Triton type becomes its name."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def main() -> None:
    """Read cases from standard input, print the figures of their launches."""
    cases = json.load(sys.stdin)
    for name, case in cases.items() if isinstance(cases, dict) else ((None, case) for case in cases):
        try:
            launches = launches_of(**case)
        except ValueError as fault:  # no configuration fits this GPU
            if name is None:
                raise
            print(json.dumps({"case": name, "unsupported": str(fault)}), flush=True)
            continue
        for launch in launches:
            try:
                figures = figures_of(launch, case.get("capability", 90))
            except Exception as fault:  # whatever the compiler raises; the case says more than its traceback
                if name is None:
                    raise
                sys.exit(f"{name}, {launch[0].__name__}: {' '.join(f'{type(fault).__name__}: {fault}'.split())}")
            print(json.dumps(figures if name is None else {"case": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
