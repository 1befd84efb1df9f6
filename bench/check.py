"""Checks providers at every gate profile, without timing them. Importing this loads no torch, checking does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mdnbench.baselines.workload import Workload

from .costs import costs
from .requests import Check, PointFailed
from .results import Point, Record
from .spec import SETUP_LIMIT_S, providers_alone, providers_of
from .sweep import make_record
from .worker import Workers


def plan_checks(providers: Sequence[str], template: Workload, profiles: Sequence[str] | None = None) -> list[Point]:
    """The points of `check_profiles`: each provider at the gate profiles that differ for its operator.

    Args:
        providers: their names.
        template: the workload; its gates are replaced, its chunk size is dropped for providers that have no chunks, and
            its head dimensions give way where a provider has a short list of its own.
        profiles: names of gate profiles; None means all.

    Raises:
        ValueError: for an unknown provider or gate profile.
    """
    from mdnbench.baselines.inputs import distinct_profiles, get_gate_profile
    from mdnbench.baselines.registry import get_provider

    for profile in profiles or ():
        get_gate_profile(profile)
    points = []
    for name in providers:
        provider = get_provider(name)
        workload = template if provider.chunk_sizes is not None else template.with_(chunk_size=None)
        if provider.head_dims is not None and (workload.head_dim_k, workload.head_dim_v) not in provider.head_dims:
            head_dim_k, head_dim_v = provider.head_dims[0]
            workload = workload.with_(head_dim_k=head_dim_k, head_dim_v=head_dim_v)
        mode = "forward_backward" if "forward_backward" in provider.modes else "forward"
        for profile in distinct_profiles(provider.operator):
            if profiles is None or profile in profiles:
                points.append(Point(name, workload.with_(gates=profile), mode, "eager"))
    return points


def check_profiles(
    points: Sequence[Point],
    device: str = "cpu",
    seed: int = 0,
    limit_s: float | None = None,
    log_path: str | Path = os.devnull,
) -> Iterator[Record]:
    """Check each point against the float64 truth in a worker process and yield its row, without samples.

    Args:
        points: of `plan_checks`.
        device: "cpu", "cuda" or "cuda:N".
        seed: the check uses the next one, as in a sweep.
        limit_s: of one check; None means the set-up limit of the device, see `SweepSpec`.
        log_path: gets what the providers print.

    Raises:
        RuntimeError: when no worker process can be started.
    """
    limit_s = SETUP_LIMIT_S[device.partition(":")[0]] if limit_s is None else limit_s
    providers = providers_of(tuple({point.provider for point in points}))
    workers = Workers(device, log_path, providers_alone(tuple(providers)))
    try:
        for point in points:
            worker = workers.of(point.provider)
            provider = providers[point.provider]
            operator = provider.operator.name
            try:
                record = make_record(point, operator, seed, worker.check(Check(point, seed), limit_s))
            except PointFailed as stop:
                record = make_record(point, operator, seed, stop.failure.found, failure=stop.failure)
            yield replace(record, **costs(provider, point))
    finally:
        workers.stop()
