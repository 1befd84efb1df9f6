"""Compiles what a forward pass would launch on a GPU that is not here, and prints what the code needs.

A script, run in a process of its own, because Triton decides at import whether it interprets:

    echo '[{"form": "chunk", "dtype": "bfloat16", "B": 4, "T": 4096, "H": 16, "HV": 16, "K": 128, "V": 128}]' \
        | python tests/kernels/compile_launches.py

One JSON object a launch comes out: kernel, registers (a thread), stack_bytes (spills, a thread), shared_bytes
(a program), vector_loads (of 16 bytes, in the PTX).
"""

import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mdnbench.kernels import forward, recurrent
from mdnbench.kernels.config import choose_config

# Shared memory a program may use in bytes, and multiprocessors: of an A100, an L40S and an H200.
LIMITS = {80: (166912, 108), 89: (101376, 142), 90: (232448, 132)}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
MODULES = {"chunk": forward, "recurrent": recurrent}


class Recorder:
    """Stands in the place of a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@contextmanager
def recorded(module):
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, triton.runtime.JITFunction)}
    kernels = {name: kernel for name, kernel in kernels.items() if name.endswith("_kernel")}
    launches = []
    for name, kernel in kernels.items():
        setattr(module, name, Recorder(kernel, launches))
    yield launches
    for name, kernel in kernels.items():
        setattr(module, name, kernel)


def launches_of(form, dtype, B, T, H, HV, K, V, capability=90, free_p=False, packed=False, states=True, chunk_size=64):
    """(kernel, arguments, options) of every launch, from tensors without memory."""
    dtype = getattr(torch, dtype)
    cu_seqlens = torch.empty(B + 1, dtype=torch.int64, device="meta") if packed else None
    N, B = B, 1 if packed else B
    q = torch.empty(B, T, H, K, dtype=dtype, device="meta")
    gate = torch.empty(B, T, HV, device="meta")
    v = torch.empty(B, T, HV, V, dtype=dtype, device="meta")
    state = torch.empty(2, N, HV, K, V, device="meta") if states else None
    arguments = [q, q, v, gate, gate, q if free_p else None, gate, gate, None, state, states, cu_seqlens, True, True]
    with recorded(MODULES[form]) as launches:
        if form == "chunk":
            config = choose_config(K, V, chunk_size, dtype.itemsize, N * HV, free_p, *LIMITS[capability])
            forward.chunk_forward(*arguments, chunk_size, config=config)
        else:
            recurrent.recurrent_forward(*arguments)
    return launches


def compiled(kernel, args, options, capability):
    """As Triton compiles a launch whose pointers are multiples of 16."""
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


def usage_of(code):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    vector_loads = code.asm["ptx"].count("ld.global.v4.b32")
    shared = code.metadata.shared
    return {"registers": registers, "stack_bytes": stack, "shared_bytes": shared, "vector_loads": vector_loads}


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        for kernel, args, options in launches_of(**case):
            code = compiled(kernel, args, options, case.get("capability", 90))
            print(json.dumps({"kernel": kernel.__name__, **usage_of(code)}), flush=True)
