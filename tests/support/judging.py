"""Completions judged by a pool, all at once."""

from collections.abc import Sequence

from aspo_lightning.rewards import RewardItem, RewardPool, RewardResult


def judged(pool: RewardPool, items: Sequence[RewardItem]) -> list[RewardResult]:
    """What the rewards say about each, in their order."""
    return [judgement.result() for judgement in [pool.judge(item) for item in items]]
