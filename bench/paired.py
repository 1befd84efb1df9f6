"""Statistics of paired log-ratios: a sign-flip test with its estimate and interval, and a noise floor. Loads no torch.

Under "no difference" the sign of a pair's log-ratio is a coin, so that flipping the signs of n pairs gives the exact
null distribution, whatever the noise looks like. It is taken on signed ranks (Wilcoxon, Biometrics Bulletin 1, 1945),
which one disturbed pair cannot carry away; 8 pairs reach p = 2/256. The estimate and the interval that belong to this
test come from the averages of all pairs of values (Hodges and Lehmann, Ann. Math. Statist. 34, 1963).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

FALSE_DISCOVERY_RATE = 0.05  # of the points called slower or faster, at most this part is called so by chance
CONFIDENCE = 0.95
MIN_PAIRS = 12  # 8 would do for significance; with 12, one disturbed pair cannot move the interval
MIN_FLOOR_RATIOS = 6
_RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """The centre of n log-ratios, its 95 % interval (None below 6 values) and the two-sided p of "the centre is 0"."""

    centre: float
    low: float | None
    high: float | None
    p_value: float


def pairs_needed(points: int) -> int:
    """The fewest pairs, an even number of at least 12, with which one slow point among `points` can be significant.

    The smallest p of n pairs is 2 / 2^n, and one point of m must reach the false-discovery rate / m.
    """
    needed = math.ceil(math.log2(2 * max(points, 1) / FALSE_DISCOVERY_RATE))
    return max(MIN_PAIRS, needed + needed % 2)


def estimate(log_ratios: Sequence[float]) -> Estimate:
    """Estimate, interval and p of the log-ratios of pairs (see the head of this module).

    Values of exactly 0, and ties of opposite sign, count for neither direction: the p is then too large, never too
    small.

    Raises:
        ValueError: when there are none.
    """
    if not len(log_ratios):
        raise ValueError("log_ratios is empty: an estimate needs at least one pair")
    averages = _walsh_averages(np.asarray(log_ratios, dtype=float))
    most = max(int((averages > 0).sum()), int((averages < 0).sum()))
    p_value = min(1.0, 2 * _rank_tail(len(log_ratios), most))
    rank = _interval_rank(len(log_ratios))
    low, high = (None, None) if rank is None else (float(averages[rank - 1]), float(averages[-rank]))
    return Estimate(float(np.median(averages)), low, high, p_value)


def adjust(p_values: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg: a point whose adjusted p is at most q belongs to a set with a false-discovery rate of q.

    Benjamini and Hochberg, J. R. Statist. Soc. B 57, 1995.
    """
    total = len(p_values)
    adjusted = [0.0] * total
    smallest = 1.0
    for rank, index in zip(range(total, 0, -1), sorted(range(total), key=p_values.__getitem__, reverse=True)):
        smallest = min(smallest, p_values[index] * total / rank)
        adjusted[index] = smallest
    return adjusted


def noise_floor(same_code_log_ratios: Sequence[float], pairs: int, points: int) -> float | None:
    """How far from 1 a gate of this machine can see a ratio when nothing has changed.

    Draws gates of `pairs` pairs from log-ratios of blocks of the same code, with random signs, and returns the limit
    that the intervals of all but 5 % / `points` of them stay within: a gate without a change finds all its points
    the same 19 times in 20.

    Args:
        same_code_log_ratios: ln(later / earlier) of neighbouring blocks of one revision.
        pairs: of the gate.
        points: of the gate.

    Returns:
        0.04 for a ratio between 1 / 1.04 and 1.04; None when there are fewer than 6 values, or fewer than 6 pairs.
    """
    rank = _interval_rank(pairs)
    if rank is None or len(same_code_log_ratios) < MIN_FLOOR_RATIOS:
        return None
    draw = np.random.default_rng(0)  # the same data gives the same verdict
    gates = draw.choice(np.asarray(same_code_log_ratios, dtype=float), (_RESAMPLES, pairs))
    averages = _walsh_averages(gates * draw.choice((-1.0, 1.0), gates.shape))
    reached = np.maximum(-averages[:, rank - 1], averages[:, -rank])
    return math.expm1(float(np.quantile(reached, 1 - (1 - CONFIDENCE) / points)))


def _walsh_averages(values: np.ndarray) -> np.ndarray:
    """The averages of every value with itself and every other, along the last axis, sorted."""
    first, second = np.triu_indices(values.shape[-1])
    return np.sort((values[..., first] + values[..., second]) / 2, axis=-1)


@cache
def _rank_counts(count: int) -> np.ndarray:
    """Probabilities of the sum of the ranks with a plus sign, 0 to count (count + 1) / 2, when signs are coins.

    As many Walsh averages are positive as this sum says.
    """
    chances = np.ones(1)
    for rank in range(1, count + 1):
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    return chances


def _rank_tail(count: int, least: int) -> float:
    """P(sum of ranks >= least)."""
    return float(_rank_counts(count)[least:].sum())


@cache
def _interval_rank(count: int) -> int | None:
    """The largest k for which the k-th smallest and the k-th largest Walsh average hold the centre with 95 %."""
    below = np.cumsum(_rank_counts(count))
    rank = int((below <= (1 - CONFIDENCE) / 2 + 1e-12).sum())
    return rank or None
