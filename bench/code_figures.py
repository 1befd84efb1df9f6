"""What compiled GPU code costs, counted in its listing: instructions by class, and how many programs fit. No torch.

The classes are those of the hardware's units: what a program keeps busy, and what it waits for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

CLASSES = ("tensor_core", "shared_memory", "global_memory", "barriers", "local_memory", "other")

# The first pattern that matches the start of an opcode gives its class. Copies from global to shared memory, LDGSTS
# and cp.async, count as global: that is where they wait.
_SASS_CLASSES = (
    ("tensor_core", r"[A-Z0-9]*MMA$"),
    ("barriers", r"(BAR|DEPBAR|LDGDEPBAR|ARRIVES|MEMBAR|ERRBAR|FENCE|SYNCS|WARPGROUP|WARPSYNC|UTMACMDFLUSH)$"),
    ("local_memory", r"(LDL|STL)$"),
    ("shared_memory", r"(LDS|STS|ATOMS|LDSM|STSM|REDS)$"),
    ("global_memory", r"(LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|UTMA[A-Z]+|UBLKCP)$"),
)
_PTX_CLASSES = (
    ("barriers", r"(bar|barrier|mbarrier|membar|fence|griddepcontrol)\b"),
    ("barriers", r"cp\.async\.((bulk\.)?(commit|wait)_group|wait_all|mbarrier)"),
    ("barriers", r"wgmma\.(fence|commit|wait)"),
    ("tensor_core", r"(mma|wmma|wgmma|tcgen05\.mma)\b"),
    ("local_memory", r"(ld|st)(\.volatile|\.weak|\.relaxed)?\.local\b"),
    ("shared_memory", r"((ld|st|atom|red)(\.[a-z]+)*\.shared|ldmatrix|stmatrix)\b"),
    ("global_memory", r"((ld|st|atom|red)(\.[a-z]+)*\.global|cp\.async|prefetch)\b"),
)
_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_PTX_STATEMENT = re.compile(r"(?:^|[;{])[ \t]*(?:@!?%\w+[ \t]+)?([a-z][a-z0-9_]*(?:[.:]+\w+)*)(?=[ \t;])", re.MULTILINE)
_SASS_BYTES = 16  # an instruction, from Volta on

# A multiprocessor's registers, how they are given to warps, and what a program's shared memory costs beside its own.
_REGISTERS, _REGISTER_UNIT, _PARTITIONS, _WARP_THREADS = 65536, 256, 4, 32
_SHARED_RESERVED, _SHARED_UNIT = 1024, 128


@dataclass(frozen=True)
class Target:
    """A GPU that code is compiled for.

    Attributes:
        capability: compute capability times ten.
        program_shared_bytes: shared memory a program may use.
        multiprocessors: of the GPU named in `TARGETS`.
        shared_bytes, warps, programs: what a multiprocessor holds at most.
    """

    capability: int
    program_shared_bytes: int
    multiprocessors: int
    shared_bytes: int
    warps: int
    programs: int


TARGETS = {
    "sm_80": Target(80, 166912, 108, 167936, 64, 32),  # A100
    "sm_89": Target(89, 101376, 142, 102400, 48, 24),  # L40S
    "sm_90": Target(90, 232448, 132, 233472, 64, 32),  # H100, H200
}


def get_target(name: str) -> Target:
    """The target of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in TARGETS:
        raise ValueError(f"--target {name!r} is unknown: choose from {', '.join(TARGETS)}")
    return TARGETS[name]


def programs_per_multiprocessor(target: Target, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many programs a multiprocessor runs at a time, by registers, shared memory and warps; 0: one does not fit.

    Args:
        registers: of a thread.
        shared_bytes: of a program.
        num_warps: of a program.
    """
    if shared_bytes > target.program_shared_bytes:
        return 0
    of_warp = _round_up(max(1, registers) * _WARP_THREADS, _REGISTER_UNIT)
    warps = min(target.warps, _REGISTERS // _PARTITIONS // of_warp * _PARTITIONS)
    shared = _round_up(shared_bytes, _SHARED_UNIT) + _SHARED_RESERVED
    return min(target.programs, warps // num_warps, target.shared_bytes // shared)


def count_sass(listing: str) -> tuple[dict[str, int], int]:
    """Instructions by class in a listing of `cuobjdump -sass`, and the code's size in bytes.

    NOPs, which fill code up to a round size, count in the size alone.
    """
    opcodes = _SASS_LINE.findall(listing)
    return _count((opcode for opcode in opcodes if opcode != "NOP"), _SASS_CLASSES), len(opcodes) * _SASS_BYTES


def count_ptx(text: str) -> dict[str, int]:
    """Instructions by class in PTX; inline assembly included, comments, labels and directives not."""
    return _count(_PTX_STATEMENT.findall(re.sub(r"//.*|/\*.*?\*/", "", text)), _PTX_CLASSES)


def _count(opcodes: Iterable[str], classes: tuple[tuple[str, str], ...]) -> dict[str, int]:
    counts = dict.fromkeys(CLASSES, 0)
    for opcode in opcodes:
        counts[next((name for name, pattern in classes if re.match(pattern, opcode)), "other")] += 1
    return counts


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
