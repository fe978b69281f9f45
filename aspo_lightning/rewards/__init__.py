"""Rewards: functions ``reward(completion: str, row: dict) -> float``, one file each, run in killable processes.

A task names them by their import paths (``data.train.reward``). 1.0 is a full solution. A completion starts with
``<think>`` where its prompt ended with that. What else a reward can do is in its attributes, or in methods of an object
with ``__call__``: ``answer(completion, row) -> str | None``, what a completion answers, for a vote; ``check()``, which
raises an error if the reward can't be used on this machine. Imports nothing heavy: every worker process imports it.
"""

from aspo_lightning.rewards.pool import Call, Judgement, Result, RewardItem, RewardPool, RewardResult

__all__ = ["Call", "Judgement", "Result", "RewardItem", "RewardPool", "RewardResult"]
