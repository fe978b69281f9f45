"""Environments: functions ``environment(turns: list[str], row: dict) -> str | None``, one file each.

They reply to the model's turns so far, or end the episode with None. They run in the reward pool's processes.
"""
