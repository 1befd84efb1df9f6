"""Which rows a report is made of, by the options that name them in a sweep. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import parse
from .results import MODES, REGIMES, Record

# By option: the values of a row of which one has to be asked for.
_VALUES: dict[str, Callable[[Record], tuple[Any, ...]]] = {
    "--provider": lambda record: (record.point.provider, record.operator),
    "--seq-len": lambda record: (record.point.workload.seq_len,),
    "--head-dim": lambda record: (record.point.workload.head_dim_k,),
    "--v-head-dim": lambda record: (record.point.workload.head_dim_v,),
    "--mode": lambda record: (record.point.mode,),
    "--regime": lambda record: (record.point.regime,),
    "--gates": lambda record: (record.point.workload.gates,),
}
_NUMBERS = ("--seq-len", "--head-dim", "--v-head-dim")
_NAMES = {"--mode": MODES, "--regime": REGIMES}  # of the others those of the rows


def keeper(given: Mapping[str, str | Sequence[str] | None], records: Sequence[Record]) -> Callable[[Record], bool]:
    """A function that says whether a row is asked for.

    Args:
        given: the text of each option of `_VALUES`; those that are None or absent ask for nothing.
        records: the rows there are.

    Raises:
        ValueError: naming the option, for text that is not of its form and for a name that no row has; and, naming all
            of them, when no row is left.
    """
    wanted = {}
    for option, text in given.items():
        if not text:
            continue
        texts = [text] if isinstance(text, str) else text
        if option in _NUMBERS:
            wanted[option] = set(parse.parse_ints(option, ",".join(texts)))
        else:
            there = sorted({value for record in records for value in _VALUES[option](record)})
            wanted[option] = set(parse.parse_choices(option, texts, _NAMES.get(option, there)))

    def keep(record: Record) -> bool:
        return all(values & set(_VALUES[option](record)) for option, values in wanted.items())

    if not any(map(keep, records)):
        asked = " ".join(f"{option} {_text(values)}" for option, values in wanted.items())
        there = {option: _text({_VALUES[option](record)[0] for record in records}) for option in wanted}
        have = ", ".join(f"{option} {values}" for option, values in there.items())
        raise ValueError(f"{asked}: no row has all of this; the {len(records)} rows have {have}")
    return keep


def _text(values: set[Any]) -> str:
    return ",".join(map(str, sorted(values)))
