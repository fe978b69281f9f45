"""What can be told of a few runs: intervals over seeds, and tests that are exact however few there are."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from aspo_lightning.errors import ConfigError

Values = np.ndarray
"""float64, one for each seed, or [seed, measure]."""

MOST_SPLITS = 20_000
"""The most ways to split runs into two groups of which all are tried; of more, so many are drawn."""


class Estimate(NamedTuple):
    """A value with its 95% interval; the interval is NaN where one seed is all there is."""

    value: float
    low: float
    high: float


def mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds, with Student's interval."""
    x = np.asarray(values, dtype=np.float64)
    center = float(x.mean())
    if len(x) < 2:
        return Estimate(center, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Estimate(center, center - half, center + half)


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """How far the first mean is above the second, with Welch's interval."""
    parts = [np.asarray(values, dtype=np.float64) for values in (first, second)]
    center = float(parts[0].mean() - parts[1].mean())
    if min(map(len, parts)) < 2:
        return Estimate(center, math.nan, math.nan)
    errors = [part.var(ddof=1) / len(part) for part in parts]
    if not sum(errors):
        return Estimate(center, center, center)
    freedom = sum(errors) ** 2 / sum(e**2 / (len(part) - 1) for e, part in zip(errors, parts, strict=True))
    half = float(stats.t.ppf(0.975, freedom) * math.sqrt(sum(errors)))
    return Estimate(center, center - half, center + half)


def permutation_test(first: Values, second: Values) -> Values:
    """Chance that runs of one kind, split into two groups in any way, differ as much as these do.

    One test of all measures at once (Westfall and Young 1993, single-step max-T): a measure's distance is that of the
    two means over the standard deviation of all runs, and each is held against the largest of a split. Where both
    groups are of one kind, *any* of the chances is at or below 0.05 in at most 5% of cases, whatever the distribution
    and however measures hang together.

    Args:
        first: [seed, measure].
        second: [seed, measure].

    Returns:
        [measure]; of one measure, the two-sided permutation test.
    """
    x = np.concatenate([first, second]).astype(np.float64)
    x = x - x.mean(0)
    scale = x.std(0)
    # What is all but the same to rounding is the same.
    x = np.where(scale > 1e-12, x / np.where(scale > 0, scale, 1.0), 0.0)
    distances = np.abs(splits(len(first), len(second)) @ x)  # [split, measure]; the first is the split that happened
    largest = distances.max(1)
    # Equal sums of other order differ in their last bits: those count as equal.
    return np.asarray((largest[:, None] >= distances[0] - 1e-9).mean(0))


def splits(first: int, second: int) -> Values:
    """[split, run]: weights that make the difference of two means, for each way to split the runs; the given one first.

    Drawn at random where there are more than ``MOST_SPLITS``.
    """
    total = first + second
    if math.comb(total, first) <= MOST_SPLITS:
        chosen = np.array(list(itertools.combinations(range(total), first)))
    else:
        generator = np.random.default_rng(0)
        chosen = np.stack([np.arange(first), *(generator.permutation(total)[:first] for _ in range(MOST_SPLITS - 1))])
    weights = np.full((len(chosen), total), -1.0 / second)
    np.put_along_axis(weights, chosen, 1.0 / first, axis=1)
    return weights


def holm(chances: Sequence[float]) -> list[float]:
    """Holm's adjustment of the chances of several planned comparisons."""
    order = np.argsort(chances, kind="stable")
    adjusted, most = np.empty(len(order)), 0.0
    for rank, at in enumerate(order):
        most = max(most, min(1.0, (len(order) - rank) * chances[at]))
        adjusted[at] = most
    return [float(p) for p in adjusted]


def smallest_chance(first: int, second: int) -> float:
    """The smallest p that the permutation test of so many runs can have."""
    return (2 if first == second else 1) / math.comb(first + second, first)


def check_can_tell(first: int, second: int) -> None:
    """Raises ConfigError where so few runs can never differ at the level of 5%."""
    if (least := smallest_chance(first, second)) > 0.05:
        raise ConfigError(
            f"{first} and {second} runs can't be told apart whatever they are: the smallest chance that a test of "
            f"these has is {least:.2f}. Train with more seeds."
        )
