"""A reward that a random model earns about half of the time, so that its groups have spread."""


def reward(completion: str, row: dict) -> float:
    return float(ord(completion[0]) % 2) if completion else 0.0
