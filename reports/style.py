"""How numbers read and how operators and providers look: shared by tables and plots."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle

MODE_TITLES = {"forward": "forward", "backward": "backward", "forward_backward": "forward + backward"}
MODE_SHORT = {"forward": "fwd", "backward": "bwd", "forward_backward": "fwd+bwd"}
OPERATOR_TITLES = {
    "mdn": "Momentum DeltaNet",
    "gdn": "Gated DeltaNet",
    "kda": "Kimi Delta Attention",
    "mamba2": "Mamba-2",
    "attention": "Softmax attention",
}

# Okabe and Ito's palette, told apart with every common colour blindness. Its yellow is too pale on white.
OPERATOR_COLOURS = {
    "mdn": "#D55E00",
    "gdn": "#0072B2",
    "kda": "#009E73",
    "mamba2": "#CC79A7",
    "attention": "#000000",
}
OTHER_COLOURS = ("#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
LINE_STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


THROTTLED = " !"  # beside a time that was taken while the GPU was held back


def operator_rank(operator: str) -> tuple[int, str]:
    """A sort key: the operators of mdnbench in the order of their list above, then others by alphabet."""
    known = list(OPERATOR_TITLES)
    return (known.index(operator) if operator in known else len(known), operator)


@dataclass(frozen=True)
class Look:
    """How one provider is drawn."""

    colour: str
    marker: str


def looks(providers: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """One colour an operator and one marker a provider, from (operator, provider) pairs.

    The five operators of mdnbench always keep their colour; providers take markers in the order given.
    """
    colours, others, markers = dict(OPERATOR_COLOURS), cycle(OTHER_COLOURS), cycle(MARKERS)
    found: dict[str, Look] = {}
    for operator, provider in providers:
        if operator not in colours:
            colours[operator] = next(others)
        if provider not in found:
            found[provider] = Look(colours[operator], next(markers))
    return found


def count(value: float) -> str:
    """Powers of two in binary thousands, as sequence lengths are named: 512, 2k, 128k, 1M; else the number itself."""
    value = int(value)
    for unit, size in (("M", 1024**2), ("k", 1024)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def rate(value: float) -> str:
    """Three significant digits with a decimal unit: 987, 12.3k, 4.56M, 1.2G, 4.3T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            return f"{_digits(value / size)}{unit}"
    return _digits(value)


def rate_tick(value: float) -> str:
    """A round rate with a decimal unit: 500, 20k, 1M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def bytes_tick(value: float) -> str:
    """A power of two of bytes with a binary unit: 512 MiB, 4 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def mebibytes(value: float) -> str:
    """Bytes as MiB with three significant digits, without the unit."""
    return _digits(value / 2**20)


def _digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def time_ms(median: float, low: float | None, high: float | None, samples: int) -> str:
    """Median with half its confidence interval, to the digits that the interval allows: "1.23 ± 0.01"; with the number
    of samples where they are too few for an interval: "336 (n=3)"."""
    if low is None or high is None:
        return f"{median:.3g} (n={samples})" if median < 1000 else f"{median:.0f} (n={samples})"
    half = (high - low) / 2
    if half <= 0:
        return f"{median:.4g} ± 0"
    digits = min(6, max(0, -math.floor(math.log10(half))))
    return f"{median:.{digits}f} ± {half:.{digits}f}"


def error(value: float) -> str:
    """Two significant digits with a short exponent: 2.1e-7."""
    if not math.isfinite(value):
        return str(value)
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"
