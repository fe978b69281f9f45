"""Rewards that a random model earns about half of the time, so that its groups have spread."""

import time


def parity(completion: str, row: dict) -> float:
    return float(ord(completion[0]) % 2) if completion else 0.0


def slow_parity(completion: str, row: dict) -> float:
    time.sleep(0.005)
    return parity(completion, row)


def answer(completion: str, row: dict) -> str | None:
    """For a vote."""
    return completion[:1] or None


slow_parity.answer = answer
