"""Floating-point operations and bytes of points, as their operators count them; for rows. Loads torch when asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .results import Point, Record

if TYPE_CHECKING:
    from mdnbench.baselines.provider import Provider


def costs(provider: Provider, point: Point) -> dict[str, int | None]:
    """The fields `flops` and `bytes` of a record; None where the operator has no count."""
    try:
        return {
            "flops": provider.flops(point.workload, point.mode),
            "bytes": provider.operator.bytes(point.workload, point.mode),
        }
    except Exception:  # a third party's own count: its rows have no rate, and keep their times
        return {"flops": None, "bytes": None}


def with_costs(records: Sequence[Record]) -> list[Record]:
    """The records, with counts where older rows lack them and their provider is known here."""
    if all(None not in (record.flops, record.bytes) for record in records):
        return list(records)
    from mdnbench.baselines.registry import providers

    known = providers()
    return [_with_costs(record, known.get(record.point.provider)) for record in records]


def _with_costs(record: Record, provider: Provider | None) -> Record:
    if provider is None:
        return record
    counted = costs(provider, record.point).items()
    return replace(record, **{name: count for name, count in counted if getattr(record, name) is None})
