"""A verifier's hint: the reply to a wrong number is, once, "Too low." or "Too high."."""

import re
from collections.abc import Mapping

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def environment(turns: list[str], row: Mapping[str, object]) -> str | None:
    """The hint to the first turn, by its last number; None if that was right or the second chance is used.

    Args:
        turns: the model's turns so far.
        row: ``answer`` is the right number; ``question`` is asked again.
    """
    if len(turns) > 1:
        return None
    numbers = _NUMBER.findall(turns[-1])
    right = float(str(row["answer"]))
    if not numbers:
        hint = "That is no number."
    elif float(numbers[-1]) == right:
        # Right, unless the number was wrapped in more than the verifier takes.
        return None
    else:
        hint = "Too low." if float(numbers[-1]) < right else "Too high."
    return f"{hint} {row['question']}"
