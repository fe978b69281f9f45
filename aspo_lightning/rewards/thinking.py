"""Separates thinking and answer, for all rewards."""


def answer_part(completion: str) -> str | None:
    """What comes after the thinking; None if thinking was opened and never closed: there is no answer then."""
    rest = completion.rpartition("</think>")[2]
    return None if "<think>" in rest else rest
