"""Option values of the command line: lists and ranges of whole numbers, and choices by name. Loads no torch.

Every error is a ValueError of one line that names the option, the value and a value that would be right.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence

_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_NUMBER = re.compile(r"(\d+)([km]?)", re.IGNORECASE)
_MOST_VALUES = 1000


def parse_ints(
    option: str, text: str, example: str = "512,2k,8k or 1k:64k:x2", repeats: bool = False
) -> tuple[int, ...]:
    """Whole numbers of at least 1, in the order written.

    Args:
        option: name for error messages, such as "--seq-len".
        text: comma-separated numbers and ranges, ends included. "2k" is 2048 and "1m" 1048576;
            "1k:64k:x2" multiplies by 2 from 1024 to 65536; "256:1024:256" adds 256.
        example: a right value for error messages.
        repeats: whether a number may come twice; else only its first place is kept.

    Raises:
        ValueError: when `text` is empty, not of this form, or stands for more than 1000 numbers.
    """

    def wrong(what: str) -> ValueError:
        return ValueError(f"{option} {text!r}: {what}; write for example {option} {example}")

    values: list[int] = []
    for item in text.split(","):
        parts = item.strip().split(":")
        if len(parts) == 1:
            values.append(_number(parts[0], wrong))
        elif len(parts) == 3:
            values.extend(_range(*parts, wrong))
        else:
            raise wrong(f"{item.strip()!r} is not a range start:stop:xFACTOR or start:stop:STEP")
        if len(values) > _MOST_VALUES:
            raise wrong(f"this is more than {_MOST_VALUES} numbers")
    return tuple(values) if repeats else tuple(dict.fromkeys(values))


def _number(text: str, wrong: Callable[[str], ValueError]) -> int:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise wrong(f"{text.strip()!r} is not a whole number")
    value = int(match[1]) * _UNITS[match[2].lower()]
    if value < 1:
        raise wrong(f"{text.strip()!r} is below 1")
    return value


def _range(start: str, stop: str, step: str, wrong: Callable[[str], ValueError]) -> list[int]:
    geometric = step.strip().lower().startswith("x")
    first, last = _number(start, wrong), _number(stop, wrong)
    by = _number(step.strip()[1:] if geometric else step, wrong)
    if last < first:
        raise wrong(f"the range {start}:{stop} runs backwards")
    if geometric and by < 2:
        raise wrong(f"the factor {step} is below x2")
    values = [first]
    while len(values) <= _MOST_VALUES and (following := values[-1] * by if geometric else values[-1] + by) <= last:
        values.append(following)
    return values


def parse_int(option: str, text: str, least: int = 1) -> int:
    """One whole number.

    Raises:
        ValueError: when `text` is not one, or below `least`.
    """
    if not re.fullmatch(r"\d+", text.strip()) or int(text) < least:
        raise ValueError(f"{option} {text!r} is not a whole number of at least {least}; write for example {option} 4")
    return int(text)


def parse_percent(option: str, text: str, zero: bool = True) -> float:
    """A part of 1: "3%" and "0.03" are 0.03.

    Args:
        option, text: as in `parse_ints`.
        zero: whether 0 is right.

    Raises:
        ValueError: for anything that is no number from 0 to below 1.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 or (value == 0 and not zero):
        what = "is not between 0% and 100%" if value else "is not above 0%"
        raise ValueError(f"{option} {text!r} {what}: write for example {option} 3%")
    return value


def parse_seconds(option: str, text: str) -> float:
    """A number of seconds above 0.

    Raises:
        ValueError: when `text` is not one.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{option} {text!r} is not a number of seconds above 0; write for example {option} 0.5")
    return seconds


def split_names(texts: Iterable[str]) -> tuple[str, ...]:
    """Names from options that may be repeated and comma-separated, in the order written and each once."""
    names = (name.strip() for text in texts for name in text.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def parse_choices(option: str, texts: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Comma-separated names, each one of `known`.

    Raises:
        ValueError: naming the option, the unknown name, the nearest right one and all that are known.
    """
    texts = tuple(texts)
    names = split_names(texts)
    if not names:
        raise ValueError(f"{option} {','.join(texts)!r} names nothing: choose from {', '.join(known)}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{option} {name!r} is unknown: {hint}choose from {', '.join(known)}")
    return names


def pair_head_dims(head_dims_k: Sequence[int], head_dims_v: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    """(K, V) pairs, each once: V as wide as K when not given; a single number goes with every one of the other list.

    Raises:
        ValueError: when both lists are longer than 1 and differ in length.
    """
    ks = tuple(head_dims_k)
    vs = ks if head_dims_v is None else tuple(head_dims_v)
    if len(vs) == 1:
        vs *= len(ks)
    elif len(ks) == 1:
        ks *= len(vs)
    if len(ks) != len(vs):
        raise ValueError(
            f"--v-head-dim {','.join(map(str, vs))}: {len(vs)} values for the {len(ks)} of --head-dim; "
            f"give one value, or one for each head dim"
        )
    return tuple(dict.fromkeys(zip(ks, vs)))
