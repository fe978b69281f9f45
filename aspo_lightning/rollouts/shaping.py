"""From a task reward to an advantage, and which groups are informative."""

import math
from collections.abc import Sequence

import torch

from aspo_lightning.advantages import group_advantages, has_spread
from aspo_lightning.evaluation.metrics import accuracy
from aspo_lightning.rollouts.settings import RewardSettings
from aspo_lightning.types import Rollout, RolloutGroup, TrainedSequence


def trained_sequences(
    groups: Sequence[RolloutGroup], settings: RewardSettings, max_completion_length: int
) -> list[list[TrainedSequence]]:
    """The completions of each group that go into the loss, with the advantages of their shaped rewards."""
    if not groups:
        return []
    rewards = [[shaped_reward(r, settings, max_completion_length) for r in g.rollouts] for g in groups]
    spread = torch.tensor([is_informative(g, settings, max_completion_length) for g in groups])
    shaped = torch.tensor(rewards, dtype=torch.float64)
    lengths = torch.tensor([[r.sampled_length for r in g.rollouts] for g in groups], dtype=torch.float64)
    advantages = group_advantages(shaped, settings.advantage, spread=spread, lengths=lengths).tolist()
    trained = [
        [
            TrainedSequence(group.prompt.prompt_ids, rollout, value)
            for rollout, value in zip(group.rollouts, values, strict=True)
            if not (rollout.truncated and settings.truncated == "mask")
        ]
        for group, values in zip(groups, advantages, strict=True)
    ]
    return [group for group in trained if group]


def shaped_reward(rollout: Rollout, settings: RewardSettings, max_completion_length: int) -> float:
    """The task reward plus DAPO's soft overlong penalty (arXiv 2503.14476, eq. 13).

    With buffer b and limit L: 0 up to L - b tokens, falling evenly to -overlong_penalty at L. Replies of an environment
    count as they do for the limit.
    """
    reward = task_reward(rollout, settings)
    if not settings.overlong_buffer:
        return reward
    excess = len(rollout.completion_ids) - (max_completion_length - settings.overlong_buffer)
    return reward - settings.overlong_penalty * min(1.0, max(0.0, excess / settings.overlong_buffer))


def task_reward(rollout: Rollout, settings: RewardSettings) -> float:
    """The score, or 0 for a truncated completion where that is the rule."""
    return 0.0 if rollout.truncated and settings.truncated == "zero" else rollout.reward


def is_informative(group: RolloutGroup, settings: RewardSettings, max_completion_length: int) -> bool:
    """Whether its completions differ in reward; otherwise it teaches nothing.

    By default in task reward: without that the overlong penalty alone would say what is better.
    """
    if settings.spread == "shaped":
        return has_spread([shaped_reward(r, settings, max_completion_length) for r in group.rollouts])
    return has_spread([task_reward(r, settings) for r in group.rollouts])


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over all completions of a phase, and over those that are right or wrong, if there are any.

    Length in tokens.
    """
    rollouts = [r for g in groups for r in g.rollouts]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    metrics = {
        "rollout/reward": mean([r.reward for r in rollouts]),
        "rollout/accuracy": accuracy(groups),
        "rollout/length": mean([r.sampled_length for r in rollouts]),
        "rollout/truncated_fraction": mean([r.truncated for r in rollouts]),
        "rollout/repetition_rate": mean([r.repetition_rate for r in rollouts]),
        "rollout/failed_rewards": float(sum(r.failed for r in rollouts)),
    }
    for name, solved in (("right", True), ("wrong", False)):
        if some := [r for r in rollouts if r.solved == solved]:
            metrics[f"rollout/length_{name}"] = mean([r.sampled_length for r in some])
            metrics[f"rollout/repetition_rate_{name}"] = mean([r.repetition_rate for r in some])
    return metrics
