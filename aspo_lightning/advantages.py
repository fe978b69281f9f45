"""Group-relative advantages: how much better a completion is than its siblings."""

from typing import Literal

import torch
from torch import Tensor

AdvantageEstimator = Literal["group_std", "group_mean", "leave_one_out", "batch_std"]

# Rewards that differ by less than this are equal: a sum of float rewards may differ in its last bits.
SPREAD_TOLERANCE = 1e-9


def has_spread(rewards: Tensor) -> Tensor:
    """[G] bool: whether the task rewards[G, S] of each group differ, judged by max - min.

    A group without spread says nothing about which completion is better. Its standard deviation may still be a tiny
    number > 0 by rounding, which would turn into advantages of size 1; so the deviation is not what is asked.
    """
    return rewards.amax(1) - rewards.amin(1) > SPREAD_TOLERANCE


def group_advantages(rewards: Tensor, estimator: AdvantageEstimator = "group_std") -> Tensor:
    """Advantages[G, S] of rewards[G, S], in float64, for G groups of S completions.

    - ``group_std``: (R - mean) / (std + 1e-6) of the group, the unbiased std (GRPO, arXiv 2402.03300).
    - ``group_mean``: R - mean of the group (Dr. GRPO, arXiv 2503.20783).
    - ``leave_one_out``: R - mean of the other completions of the group (RLOO, arXiv 2402.14740).
    - ``batch_std``: R - mean of the group, over the std of all these differences (REINFORCE++ baseline,
      arXiv 2501.03262).

    Groups without spread get zeros.
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean(1, keepdim=True)
    if estimator == "group_std":
        advantages = centred / (rewards.std(1, keepdim=True) + 1e-6)
    elif estimator == "group_mean":
        advantages = centred
    elif estimator == "leave_one_out":
        size = rewards.shape[1]
        advantages = centred * size / (size - 1)
    else:
        advantages = centred / (centred.std() + 1e-6)
    return torch.where(has_spread(rewards).unsqueeze(1), advantages, 0.0)
