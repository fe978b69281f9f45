"""Measurements of completions: repetition, and how many of k samples solve a problem."""

import math


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
