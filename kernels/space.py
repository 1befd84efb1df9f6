"""The search space of the configurations, kernel by kernel, and the one predicate that says which are valid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from .config import (
    BackwardConfig,
    KernelConfig,
    backward_shared_memory,
    block_size,
    choose_backward_config,
    choose_config,
    prepare_shared_memory,
    scan_shared_memory,
)

Config = KernelConfig | BackwardConfig

CONFIGS = {"forward": KernelConfig, "backward": BackwardConfig}  # by direction

# Registers a thread may use in a limited kernel: 168 lets three warps of four, 128 four of four, onto a partition.
_REGISTER_LIMITS = (None, 128, 168)

# What is tried for each kernel of a direction: values of its fields. The kernels run one after the other, so the best
# of each make the best of all, and trials add up instead of multiplying.
SPACE: dict[str, dict[str, dict[str, tuple[int | None, ...]]]] = {
    "forward": {
        "prepare": {"prepare_warps": (2, 4, 8), "prepare_max_registers": _REGISTER_LIMITS},
        "scan": {
            "block_v": (16, 32, 64),
            "scan_warps": (4, 8),
            "scan_stages": (1, 2, 3),
            "scan_max_registers": (None, 128),
        },
    },
    "backward": {
        "attention": {"attention_warps": (2, 4, 8)},
        "scan": {
            "scan_block_v": (16, 32, 64),
            "scan_warps": (4, 8),
            "scan_stages": (1, 2, 3),
            "scan_max_registers": (None, 128),
        },
        "matrices": {
            "matrices_block_v": (32, 64),
            "matrices_warps": (4, 8),
            "matrices_stages": (1, 2),
            "matrices_max_registers": _REGISTER_LIMITS,
        },
        "states": {
            "states_block_k": (32, 64, 128),
            "states_block_v": (32, 64),
            "states_warps": (4, 8),
            "states_stages": (2, 3),
            "states_max_registers": (None, 128),
        },
        "gradients": {
            "gradients_block_k": (32, 64, 128),
            "gradients_block_v": (32, 64),
            "gradients_warps": (4, 8),
            "gradients_stages": (2, 3),
            "gradients_max_registers": (None, 128, 168),
        },
    },
}


class Shape(NamedTuple):
    """What decides whether a configuration is valid; fields as the arguments of `choose_config`."""

    head_dim_k: int
    head_dim_v: int
    chunk_size: int
    element_bytes: int
    heads: int
    free_p: bool
    shared_memory_bytes: int
    multiprocessors: int


def table_config(direction: str, shape: Shape) -> Config:
    """The choice of the table in config.py. Raises ValueError as that does."""
    return (choose_config if direction == "forward" else choose_backward_config)(*shape)


def search_space(direction: str, kernel: str, shape: Shape, base: Config) -> Iterator[Config]:
    """`base`, then every valid configuration that differs from it in the fields of one kernel.

    Args:
        direction: "forward" or "backward".
        kernel: a key of SPACE[direction].
        shape: of the problem.
        base: gives the fields of the other kernels.
    """
    yield base
    fields = {
        name: (1,) if name.endswith("_stages") and _most_stages(name, shape) == 1 else values
        for name, values in SPACE[direction][kernel].items()
    }
    for values in itertools.product(*fields.values()):
        config = replace(base, **dict(zip(fields, values)))
        if config != base and why_invalid(direction, config, shape) is None:
            yield config


def _most_stages(name: str, shape: Shape) -> int:
    """The exact products of float32 keep no tile in flight."""
    return 1 if shape.element_bytes == 4 and name != "matrices_stages" else 4


def why_invalid(direction: str, config: Config, shape: Shape) -> str | None:
    """One sentence on why the kernels cannot run so, or None: what is decided before anything is compiled.

    Valid means that tiles are powers of two within the dimensions, that registers suffice, and that the estimate of
    shared memory fits. Whether the code is right on a GPU is found by running it alone.
    """
    block_k, block_v = block_size(shape.head_dim_k), block_size(shape.head_dim_v)
    values: Mapping[str, Any] = asdict(config)
    for name, value in values.items():
        limit = block_k if name.endswith("block_k") else block_v if name.endswith("block_v") else None
        if limit is not None and not (16 <= value <= limit and value & (value - 1) == 0):
            return f"{name}={value} is no power of two from 16 to {limit}"
        if name.endswith("_warps") and value not in (1, 2, 4, 8):
            return f"{name}={value} is not 1, 2, 4 or 8"
        if name.endswith("_stages"):
            most = _most_stages(name, shape)
            if not 1 <= value <= most:
                return f"{name}={value} is not from 1 to {most} for {shape.element_bytes} bytes an element"
        if name.endswith("_max_registers") and value is not None:
            warps = values[name.replace("max_registers", "warps")]
            if not 24 <= value <= 255 or value * 32 * warps > 65536:
                return f"{name}={value} is not possible with {warps} warps"
    sizes = (block_k, shape.chunk_size, shape.element_bytes, shape.free_p)
    if direction == "forward":
        needed = {"scan": scan_shared_memory(config, *sizes), "prepare": prepare_shared_memory(*sizes)}
    else:
        if shape.free_p and config.gradients_block_k != block_k:
            return f"gradients_block_k={config.gradients_block_k} is not {block_k}: dp needs a whole row of p"
        for name in ("matrices_block_v", "gradients_block_v"):
            if values[name] > block_k:
                return f"{name}={values[name]} is above {block_k}, the tile of K: such code is miscompiled for sm_90"
        needed = backward_shared_memory(config, *sizes)
    kernel = max(needed, key=needed.get)
    if needed[kernel] > shape.shared_memory_bytes:
        return f"{kernel} needs {needed[kernel]} bytes of shared memory of {shape.shared_memory_bytes}"
    return None
