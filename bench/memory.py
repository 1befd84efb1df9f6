"""How much memory a call needs, and how much it keeps for backward. Runs in the worker process."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .measure import Call


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each storage once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def peak_memory_bytes(open_call: Callable[[], Call], tensors: Iterable[Tensor], device: torch.device) -> int:
    """`tensors` and everything PyTorch allocates for one call, at its highest.

    Exact: from the statistics of the CUDA allocator, or from the record of every allocation on a CPU. Memory that
    does not come from PyTorch's allocators is not seen.

    Args:
        open_call: makes the function that is measured; what it allocates and holds counts, what it frees does not.
        tensors: inputs of the call, allocated before.
        device: where the call runs.
    """
    return bytes_of(tensors) + (_peak_on_cuda if device.type == "cuda" else _peak_on_cpu)(open_call)


def saved_memory_bytes(call: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward of `call`, each storage once, `inputs` not counted.

    What a custom autograd Function keeps without `save_for_backward` is not seen.
    """
    given = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()  # held in `kept`, so that no other storage gets its address
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return x.detach()  # an output that is its own saved tensor would keep itself alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = call()
    saved = sum(storage.nbytes() for storage in kept.values())
    del output
    return saved


def _peak_on_cuda(open_call: Callable[[], Call]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    call = open_call()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(open_call: Callable[[], Call]) -> int:
    call, opened = _allocations(open_call)
    _, called = _allocations(call)
    now = peak = sum(opened)
    for size in called:
        now += size
        peak = max(peak, now)
    return peak


def _allocations(function: Callable[[], object]) -> tuple[object, list[int]]:
    """What `function` returns, and the bytes of each allocation (positive) and release (negative) in order of time."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    return result, [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
