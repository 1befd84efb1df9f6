"""Clocks, power, heat and throttling of a GPU beside every block of samples, by NVML. Loads no torch.

The readings are taken in the sweep's own process: the worker that measures is not disturbed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

from .results import GpuReading

# Readings during a block: the first after so many seconds, each later one when so many times as much has gone by. So a
# block of whatever length has one in its last third, and a long one has few.
FIRST_READING_S = 0.01
TIMES_BETWEEN_READINGS = 1.5

# Bits of nvmlDeviceGetCurrentClocksEventReasons in nvml.h that mean the GPU is slower than it could be. Not among them:
# idle, clocks that somebody set, and the display's.
SLOWED_BY = {0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "heat", 0x40: "heat",
             0x80: "power brake"}  # fmt: skip
POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT; nvmlDeviceGetPowerUsage is the average of a second on recent GPUs
NEEDS_REST = frozenset({"power cap", "heat", "hardware slowdown", "power brake"})


class GpuMonitor:
    """Reads one GPU. What the driver does not tell is None in the readings; without NVML there are none.

    Args:
        device: "cuda", "cuda:N", or "cpu", which has no readings. Numbered as CUDA_VISIBLE_DEVICES has it.
        nvml: a module with the functions of pynvml; None means the installed one, if there is one.
    """

    def __init__(self, device: str, nvml: Any = None) -> None:
        self._nvml = self._handle = None
        kind, _, index = device.partition(":")
        if kind != "cuda":
            return
        if nvml is None:
            try:
                import pynvml as nvml
            except ImportError:
                return
        try:
            nvml.nvmlInit()
            self._handle = _handle(nvml, int(index or 0))
        except nvml.NVMLError:
            return
        self._nvml = nvml

    @property
    def available(self) -> bool:
        """Whether there are readings."""
        return self._nvml is not None

    def read(self, at: str) -> GpuReading | None:
        """The state now; None without NVML."""
        if self._nvml is None:
            return None
        nvml, handle = self._nvml, self._handle
        bits = None
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            if bits is None and hasattr(nvml, name):  # the first since driver 535
                bits = self._ask(getattr(nvml, name), handle)
        power, limit = self._power_mw(), self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        return GpuReading(
            at,
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            power_w=None if power is None else round(power / 1000, 1),
            power_limit_w=None if limit is None else round(limit / 1000, 1),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            slowed_by=tuple(dict.fromkeys(name for bit, name in SLOWED_BY.items() if (bits or 0) & bit)),
        )

    def watch(self) -> BlockWatch:
        """The readings of one block of samples, begun now."""
        return BlockWatch(self.read)

    def close(self) -> None:
        """Release NVML."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None

    def _power_mw(self) -> int | None:
        """What the GPU draws at this moment; where the driver has no such field, over about the last second."""
        nvml, handle = self._nvml, self._handle
        if hasattr(nvml, "nvmlDeviceGetFieldValues"):
            fields = self._ask(nvml.nvmlDeviceGetFieldValues, handle, [POWER_INSTANT])
            if fields is not None and fields[0].nvmlReturn == 0 and fields[0].value.uiVal:
                return fields[0].value.uiVal
        return self._ask(nvml.nvmlDeviceGetPowerUsage, handle)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:  # not supported by this GPU, or not permitted in this container
            return None


class BlockWatch:
    """Readings before, during and after a block: made before it, called while it runs, ended after it.

    Args:
        read: as `GpuMonitor.read`.
    """

    def __init__(self, read: Callable[[str], GpuReading | None]) -> None:
        self._read = read
        self._readings = [read("before")]
        self._start: float | None = None
        self._next = FIRST_READING_S  # after the start

    def __call__(self) -> float:
        """Take a reading if one is due; the first call says that the samples begin now.

        Returns:
            Seconds until the next one is due.
        """
        if self._readings[0] is None:  # no NVML
            return math.inf
        now = time.monotonic()
        self._start = now if self._start is None else self._start
        since = now - self._start
        if since >= self._next:
            self._readings.append(self._read("during"))
            self._next = TIMES_BETWEEN_READINGS * since
        return self._next - since

    def end(self) -> tuple[GpuReading, ...]:
        """All readings, that after the block last; empty without NVML."""
        self._readings.append(self._read("after"))
        return tuple(reading for reading in self._readings if reading is not None)


def needs_rest(readings: tuple[GpuReading, ...]) -> bool:
    """Whether a GPU that was read so during or after a block gets faster by a pause."""
    return any(NEEDS_REST & set(reading.slowed_by) for reading in readings if reading.at != "before")


def _handle(nvml: Any, index: int) -> Any:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(index)
    names = [name.strip() for name in visible.split(",")]
    name = names[index] if index < len(names) else str(index)
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
