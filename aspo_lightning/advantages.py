"""Group-relative advantages: how much better a completion is than its siblings."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

AdvantageEstimator = Literal["group_std", "group_mean", "leave_one_out", "batch_std"]

# Rewards that differ by less than this are equal: a sum of float rewards may differ in its last bits.
SPREAD_TOLERANCE = 1e-9


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether the task rewards of a group differ, judged by max - min.

    A group without spread says nothing about which completion is better. Its standard deviation may still be a tiny
    number > 0 by rounding, which would turn into advantages of size 1; so the deviation is not what is tested.
    """
    return max(rewards) - min(rewards) > SPREAD_TOLERANCE


def group_advantages(rewards: Tensor, estimator: AdvantageEstimator = "group_std", *, spread: Tensor) -> Tensor:
    """Advantages[G, S] of shaped rewards[G, S], in float64, for G groups of S completions.

    - ``group_std``: (R - mean) / (std + 1e-6) of the group, the unbiased std (GRPO, arXiv 2402.03300).
    - ``group_mean``: R - mean of the group (Dr. GRPO, arXiv 2503.20783).
    - ``leave_one_out``: R - mean of the other completions of the group (RLOO, arXiv 2402.14740).
    - ``batch_std``: R - mean of the group, over the std of all these differences (REINFORCE++ baseline,
      arXiv 2501.03262).

    Groups without ``spread``[G] (bool, see ``has_spread``) get zeros and are in no deviation.
    """
    rewards = rewards.double()
    spread = spread.unsqueeze(1)
    centred = torch.where(spread, rewards - rewards.mean(1, keepdim=True), 0.0)
    if estimator == "group_std":
        return centred / (rewards.std(1, keepdim=True) + 1e-6)
    if estimator == "group_mean":
        return centred
    size = rewards.shape[1]
    if estimator == "leave_one_out":
        return centred * size / (size - 1)
    completions = spread.sum() * size
    return centred / ((centred.square().sum() / (completions - 1).clamp(min=1)).sqrt() + 1e-6)
