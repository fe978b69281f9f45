"""What is measured of sampled groups: accuracy, repetition, avg@k, pass@k, maj@k and their intervals."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from aspo_lightning.types import RolloutGroup


def accuracy(groups: Sequence[RolloutGroup]) -> float:
    """The share of all completions that are full solutions."""
    rollouts = [r for g in groups for r in g.rollouts]
    return sum(r.solved for r in rollouts) / len(rollouts)


def repetition_rate(text: str, n: int) -> float:
    """The share of a response's word n-grams (lower-case, split on spaces) already seen in it.

    0 for fewer than n words. With n = 20 as measured in the ASPO authors' code.
    """
    words = text.lower().split(" ")
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, contain a solution (arXiv 2107.03374, unbiased)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} can't be told from {samples} samples; k is 1 to {samples}")
    return 1 - math.comb(samples - solved, k) / math.comb(samples, k)


def maj_at_k(answers: Sequence[str | None], solved: Sequence[bool], k: int) -> float:
    """The chance that the answer given most often by k of the samples, drawn without replacement, is right.

    Answers that solve the problem count as one, whatever their text; None is no vote. Among answers given equally often
    one is taken at random; where nobody votes, nothing is solved.
    """
    samples = len(answers)
    if not 1 <= k <= samples:
        raise ValueError(f"maj@{k} can't be told from {samples} samples; k is 1 to {samples}")
    right = sum(solved)
    wrong = Counter(a for a, s in zip(answers, solved, strict=True) if a is not None and not s)
    silent = samples - right - wrong.total()
    chance = 0.0
    for votes in range(max(1, k - samples + right), min(right, k) + 1):  # for the right answer
        # ways[drawn][tied]: to draw so many of the others, with so many answers that have as many votes, none more.
        ties = range(k // votes)
        ways = [[math.comb(silent, drawn) * (tied == 0) for tied in ties] for drawn in range(k - votes + 1)]
        for count in wrong.values():
            ways = [
                [
                    sum(
                        math.comb(count, v) * ways[drawn - v][tied - (v == votes)]
                        for v in range(min(count, votes, drawn) + 1)
                        if tied >= (v == votes)
                    )
                    for tied in ties
                ]
                for drawn in range(k - votes + 1)
            ]
        share = sum(way / (tied + 1) for tied, way in enumerate(ways[k - votes]))
        chance += math.comb(right, votes) * share / math.comb(samples, k)
    return chance


RESAMPLES = 10_000


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The bootstrap interval of a mean over problems, from their values.

    The percentile interval is too narrow for few problems; its quantiles are moved outwards as with Student's t
    (Hesterberg, arXiv 1411.5279, section 5.3). The same values have the same interval.
    """
    n = len(values)
    if n < 2:
        return math.nan, math.nan  # one problem says nothing about others
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0)
    means = np.concatenate([data[draws.integers(0, n, (500, n))].mean(1) for _ in range(RESAMPLES // 500)])
    tail = special.ndtr(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


class Measurement(NamedTuple):
    """A mean over problems, with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def measure(groups: Sequence[RolloutGroup], further_k: Sequence[int] = ()) -> dict[str, Measurement]:
    """What the completions of a benchmark show, by name.

    avg@k, pass@k and maj@k as in ``scores``; length in tokens, truncated_fraction, repetition_rate and failed_rewards
    (a share) of all completions.
    """
    samples = len(groups[0].rollouts)
    problems = [([r.solved for r in g.rollouts], [r.answer for r in g.rollouts]) for g in groups]
    values = scores(problems, further_k)
    for name, of in (
        ("length", lambda r: r.sampled_length),
        ("truncated_fraction", lambda r: r.truncated),
        ("repetition_rate", lambda r: r.repetition_rate),
        ("failed_rewards", lambda r: r.failed),
    ):
        values[name] = [math.fsum(map(of, g.rollouts)) / samples for g in groups]
    return {name: Measurement(math.fsum(v) / len(v), *interval(v)) for name, v in values.items()}


def scores(
    problems: Sequence[tuple[Sequence[bool], Sequence[str | None]]], further_k: Sequence[int] = ()
) -> dict[str, list[float]]:
    """Of each problem, given which of its k completions solve it, and what they answer.

    - avg@k: the share of solutions.
    - pass@k, maj@k: see ``metrics``; for that k, if it is more than 1, and for ``further_k``. maj@k only where the
      reward reports what a completion answers.
    """
    samples = len(problems[0][0])
    values = {f"avg@{samples}": [sum(solved) / samples for solved, _ in problems]}
    voted = any(answer is not None for _, answers in problems for answer in answers)
    for k in sorted({*further_k, *([samples] if samples > 1 else [])}):
        values[f"pass@{k}"] = [pass_at_k(samples, sum(solved), k) for solved, _ in problems]
        if voted:
            values[f"maj@{k}"] = [maj_at_k(answers, solved, k) for solved, answers in problems]
    return values
