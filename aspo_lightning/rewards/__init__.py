"""Rewards: functions ``reward(completion: str, row: dict) -> float``, one file each, run in killable processes.

1.0 is a full solution. A completion starts with ``<think>`` where its prompt ended with that. Imports nothing heavy:
every worker process imports it.
"""

from aspo_lightning.rewards.pool import Call, RewardItem, RewardPool, RewardResult

__all__ = ["Call", "RewardItem", "RewardPool", "RewardResult"]
