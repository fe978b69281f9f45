"""Group-relative advantages: how much better a completion is than its siblings.

To add one: a dataclass with ``estimate``, and its numbers by hand in ``tests/test_advantages.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rewards that differ by less than this are equal: a sum of float rewards may differ in its last bits.
SPREAD_TOLERANCE = 1e-9

EPS = 1e-6
"""Beside a deviation or a mean that divides."""


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether the task rewards of a group differ, judged by max - min.

    A group without spread says nothing about which completion is better. Its standard deviation may still be a tiny
    number > 0 by rounding, which would turn into advantages of size 1; so the deviation is not what is tested.
    """
    return max(rewards) - min(rewards) > SPREAD_TOLERANCE


class Advantage(ABC):
    """A rule that turns the rewards of a phase into advantages."""

    @abstractmethod
    def estimate(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        """Advantages[G, S] of G groups of S completions, of which each group has spread.

        Args:
            rewards: [G, S] float64, shaped.
            lengths: [G, S] float64, tokens that the model sampled.
        """


@dataclass(frozen=True)
class GroupStd(Advantage):
    """(R - mean) / std of the group, the unbiased std (GRPO, arXiv 2402.03300)."""

    def estimate(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        return _centred(rewards) / (rewards.std(1, keepdim=True) + EPS)


@dataclass(frozen=True)
class GroupMean(Advantage):
    """R - mean of the group (Dr. GRPO, arXiv 2503.20783)."""

    def estimate(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        return _centred(rewards)


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """R - mean of the other completions of the group (RLOO, arXiv 2402.14740)."""

    def estimate(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        size = rewards.shape[1]
        return _centred(rewards) * size / (size - 1)


@dataclass(frozen=True)
class BatchStd(Advantage):
    """R - mean of the group, over the std of all these differences (REINFORCE++ baseline, arXiv 2501.03262)."""

    def estimate(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        centred = _centred(rewards)
        return centred / (centred.std() + EPS)


@dataclass(frozen=True)
class LitePPO(Advantage):
    """R - mean of the group, over the std of all rewards of the phase (Lite PPO, arXiv 2508.08221)."""

    def estimate(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        return _centred(rewards) / (rewards.std() + EPS)


@dataclass(frozen=True)
class MaxRL(Advantage):
    """(R - mean) / mean of the group, the gradient of the log-likelihood of success (MaxRL, arXiv 2602.02710).

    For rewards that are at least 0: a hard problem weighs more. A group whose mean isn't above 0, by a penalty, is only
    centred.
    """

    def estimate(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        mean = rewards.mean(1, keepdim=True)
        return _centred(rewards) / torch.where(mean > 0, mean + EPS, 1.0)


@dataclass(frozen=True)
class OPO(Advantage):
    """R - mean of the group weighted by length, the baseline of least variance (OPO, arXiv 2505.23585, eq. 9).

    That holds where the squared norm of a completion's gradient grows as its length.
    """

    def estimate(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        return rewards - (lengths * rewards).sum(1, keepdim=True) / lengths.sum(1, keepdim=True)


def group_advantages(
    rewards: Tensor, advantage: Advantage = GroupStd(), *, spread: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Advantages[G, S] of shaped rewards[G, S], in float64, for G groups of S completions.

    Args:
        rewards: [G, S].
        advantage: the rule.
        spread: [G] bool, see ``has_spread``. Groups without get zeros, and the rule doesn't see them.
        lengths: [G, S] tokens that were sampled. None: all have the same.
    """
    rewards = rewards.double()
    lengths = torch.ones_like(rewards) if lengths is None else lengths.double()
    advantages = torch.zeros_like(rewards)
    if spread.any():
        advantages[spread] = advantage.estimate(rewards[spread], lengths[spread])
    return advantages


def _centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(1, keepdim=True)
