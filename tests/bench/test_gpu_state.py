"""GPU readings by a fake NVML: what is read, what may be missing, and what a sweep does with a throttled GPU."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mdnbench.bench import gpu_state
from mdnbench.bench import sweep as sweep_module
from mdnbench.bench import worker as worker_module
from mdnbench.bench.gpu_state import BlockWatch, GpuMonitor, needs_rest
from mdnbench.bench.requests import Prepared
from mdnbench.bench.results import GpuReading, read_records
from mdnbench.bench.sweep import SweepSpec, run_sweep

POWER_CAP, IDLE, SOFTWARE_HEAT, HARDWARE_HEAT = 0x4, 0x1, 0x20, 0x40


class FakeNvml:
    """The part of pynvml that is used. `reasons` holds the bits of each reading in turn, the last one for ever."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, reasons: tuple[int, ...] = (0,), missing: tuple[str, ...] = (), no_driver: bool = False) -> None:
        self.reasons, self.missing, self.no_driver = list(reasons), missing, no_driver
        self.asked_for: object = None
        self.running = False

    def nvmlInit(self) -> None:
        if self.no_driver:
            raise self.NVMLError("driver not loaded")
        self.running = True

    def nvmlShutdown(self) -> None:
        self.running = False

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked_for = index
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked_for = uuid
        return "handle"

    def _value(self, name: str, value):
        if name in self.missing:
            raise self.NVMLError("not supported")
        return value

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self._value("reasons", self.reasons.pop(0) if len(self.reasons) > 1 else self.reasons[0])

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self._value("clock", {1: 1755, 2: 3201}[kind])

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._value("power", 698_760)

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[SimpleNamespace]:
        known = fields == [186] and "instant power" not in self.missing
        return [SimpleNamespace(nvmlReturn=0 if known else 3, value=SimpleNamespace(uiVal=702_130 if known else 0))]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return self._value("limit", 700_000)

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return self._value("temperature", 64)


@pytest.fixture(autouse=True)
def _all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_reading_has_units_and_names_its_reasons() -> None:
    monitor = GpuMonitor("cuda", FakeNvml((POWER_CAP | SOFTWARE_HEAT | HARDWARE_HEAT,)))
    assert monitor.read("during") == GpuReading("during", 1755, 3201, 702.1, 700.0, 64, ("power cap", "heat"))
    assert GpuMonitor("cuda", FakeNvml((IDLE | 0x2 | 0x100,))).read("after").slowed_by == ()  # idle, set by somebody


def test_what_the_driver_does_not_tell_is_absent() -> None:
    found = GpuMonitor("cuda", FakeNvml(missing=("power", "instant power", "reasons"))).read("before")
    assert found == GpuReading("before", 1755, 3201, None, 700.0, 64, ())


def test_power_is_the_average_where_the_driver_or_its_binding_knows_no_other(monkeypatch) -> None:
    assert GpuMonitor("cuda", FakeNvml(missing=("instant power",))).read("during").power_w == 698.8
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetFieldValues")
    assert GpuMonitor("cuda", FakeNvml()).read("during").power_w == 698.8


def test_without_nvml_or_gpu_there_are_no_readings() -> None:
    for monitor in (GpuMonitor("cpu", FakeNvml()), GpuMonitor("cuda", FakeNvml(no_driver=True))):
        assert not monitor.available
        assert monitor.read("before") is None
        watch = monitor.watch()
        assert watch() == math.inf
        assert watch.end() == ()
        monitor.close()


@pytest.mark.parametrize(
    ("device", "visible", "asked_for"),
    [("cuda", None, 0), ("cuda:3", None, 3), ("cuda:1", "4,6", 6), ("cuda", "GPU-1f2e", "GPU-1f2e")],
)
def test_the_gpu_is_the_one_that_cuda_means(monkeypatch, device: str, visible: str | None, asked_for: object) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml()
    monitor = GpuMonitor(device, nvml)
    assert nvml.asked_for == asked_for
    monitor.close()
    assert not nvml.running


@pytest.mark.parametrize("block_s", [0.02, 0.05, 0.2, 1.0, 30.0])
def test_a_block_of_any_length_is_read_in_its_second_half_and_not_too_often(monkeypatch, block_s: float) -> None:
    now, taken = [100.0], []
    monkeypatch.setattr(gpu_state.time, "monotonic", lambda: now[0])
    watch = BlockWatch(lambda at: taken.append((at, now[0])) or GpuReading(at))
    begun = now[0] = now[0] + 3  # the set-up of the timed calls
    while now[0] <= begun + block_s:
        now[0] += max(0.001, min(watch(), worker_module.POLL_S))
    readings = watch.end()
    assert [reading.at for reading in readings] == ["before", *["during"] * (len(readings) - 2), "after"]
    during = [when - begun for at, when in taken if at == "during"]
    assert during[0] > 0.005  # the GPU is under load by then
    assert during[-1] > block_s / 2
    assert len(during) <= 25


def test_rest_is_for_power_and_heat_during_or_after_a_block() -> None:
    hot = GpuReading("during", slowed_by=("heat",))
    assert needs_rest((GpuReading("before"), hot))
    assert not needs_rest((replace(hot, at="before"), GpuReading("during")))
    assert not needs_rest((replace(hot, slowed_by=("sync boost",)),))
    assert not needs_rest(())


class SteadyWorker:
    """A worker whose points take 1 ms."""

    def __init__(self, *args) -> None:
        self.alive, self.prepared = True, set()

    def prepare(self, request, limit_s):
        self.prepared.add(request.point)
        return Prepared(input_sets=2)

    def block(self, request, limit_s, watch):
        watch()
        threading.Event().wait(0.02)
        watch()
        return [1.0] * 6

    def stop(self) -> None:
        self.alive = False


def test_a_sweep_keeps_the_readings_of_every_block_and_rests_a_throttled_gpu(tmp_path, monkeypatch) -> None:
    nvml = FakeNvml((0, 0, 0, POWER_CAP, POWER_CAP, 0))  # before, during, after; before, during, after; ...
    pauses = []
    monkeypatch.setattr(worker_module, "Worker", SteadyWorker)
    monkeypatch.setattr(sweep_module, "GpuMonitor", lambda device: GpuMonitor("cuda", nvml))
    monkeypatch.setattr(sweep_module.time, "sleep", pauses.append)
    spec = SweepSpec("one", ("gdn-torch",), (64,), ((16, 16),), modes=("forward",), min_time_s=1e-9)
    run_sweep(spec, tmp_path)
    (record,) = read_records(tmp_path)
    assert record.status == "ok"
    assert record.block_samples == (6, 6)
    assert [[r.at for r in block] for block in record.gpu] == [["before", "during", "after"]] * 2
    assert record.gpu[1][1].slowed_by == ("power cap",)
    assert record.gpu[0][1].sm_clock_mhz == 1755
    assert pauses == [sweep_module.REST_S]
    assert record.idle_s == sweep_module.REST_S
    assert (record.stop_reason, record.precision, record.input_sets) == ("precise", 0.005, 2)
    assert record.flops > 0
    assert record.bytes > 0
    assert not nvml.running


def test_the_worker_is_watched_while_it_samples_and_at_no_other_time(toys, tmp_path) -> None:
    from mdnbench.baselines.workload import Workload
    from mdnbench.bench.requests import Block, Prepare
    from mdnbench.bench.results import Point

    point = Point("toy-good", Workload(64, 16, 16, heads=2), "forward", "eager")
    worker = worker_module.Worker("cpu", tmp_path / "log")
    seen = []
    try:
        worker.prepare(Prepare(point, 0, full=False), 60)
        assert seen == []
        start = time.monotonic()
        worker.block(Block(point, 0.4, 10**6), 60, lambda: seen.append(time.monotonic() - start) or math.inf)
        asked = BlockWatch(GpuReading)
        worker.block(Block(point, 0.1, 10**6), 60, asked)
    finally:
        worker.stop()
    assert 3 <= len(seen) <= 40
    assert seen[-1] > 0.2
    assert sum(reading.at == "during" for reading in asked.end()) >= 3
