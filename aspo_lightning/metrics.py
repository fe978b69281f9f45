"""Measurements of completions: repetition, accuracy, and how many of k samples solve a problem."""

import math
from collections.abc import Sequence

from aspo_lightning.types import RolloutGroup

SOLVED = 1.0 - 1e-6  # a task reward from here on is a full solution


def accuracy(groups: Sequence[RolloutGroup]) -> float:
    """The share of all completions that are full solutions."""
    rollouts = [r for g in groups for r in g.rollouts]
    return sum(r.reward >= SOLVED for r in rollouts) / len(rollouts)


def repetition_rate(text: str, n: int = 20) -> float:
    """The share of a response's word n-grams (lower-case, split on spaces) already seen in it.

    0 for fewer than n words. As measured in the ASPO authors' code.
    """
    words = text.lower().split(" ")
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a solution (arXiv 2107.03374, unbiased)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} can't be told from {samples} samples; k is 1 to {samples}")
    return 1 - math.comb(samples - solved, k) / math.comb(samples, k)
