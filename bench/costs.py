"""Floating-point operations and bytes of points, as their operators count them; for rows. Loads torch when asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .results import Point, Record

if TYPE_CHECKING:
    from mdnbench.baselines.provider import Operator


def costs(operator: Operator, point: Point) -> dict[str, int | None]:
    """The fields `flops` and `bytes` of a record; None where the operator has no count."""
    try:
        return {
            "flops": operator.flops(point.workload, point.mode),
            "bytes": operator.bytes(point.workload, point.mode),
        }
    except Exception:  # a third party's own count: its rows have no rate, and keep their times
        return {"flops": None, "bytes": None}


def with_costs(records: Sequence[Record]) -> list[Record]:
    """The records, with counts where older rows lack them and their provider is known here."""
    if all(record.bytes is not None for record in records):
        return list(records)
    from mdnbench.baselines.registry import providers

    known = providers()
    return [
        replace(record, **costs(known[record.point.provider].operator, record.point))
        if record.bytes is None and record.point.provider in known
        else record
        for record in records
    ]
