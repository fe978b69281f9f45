"""The letter of an option (scientific multiple choice)."""

import re
from collections.abc import Mapping

from aspo_lightning.rewards.math import last_boxed
from aspo_lightning.rewards.thinking import answer_part

# Possessive (*+) where spaces meet spaces: going back among them would take time by their cube.
# "the answer is (B)", "Answer: B", "**Answer: B**"
_STATED = re.compile(r"(?i:answer(?:\s+is)?)\s*+:?\s*+[*_$]*+\(?\s*+([A-Z])\b")
_ALONE = re.compile(r"\W*([A-Z])\W*")
# "B", "(b)", "\text{B}", "\mathbf{(B) 5 cm}", "B. Because"; a lower-case letter with words after it is an article.
_LABELLED = re.compile(
    r"[\s$*]*+(?:\\[A-Za-z]++\s*+\{\s*+)*+\(?\s*+(?:([A-Z])(?:[).:\s}$*]|$)|([a-z])(?:[).:}$*]|\s*$))"
)


class ChoiceReward:
    """Compares the letter that the completion chooses, see ``chosen_letter``."""

    def __call__(self, completion: str, row: Mapping[str, object]) -> float:
        """1.0 if the letter is ``row["answer"]``, else 0.0."""
        return float(chosen_letter(completion) == str(row["answer"]).strip().upper())

    def answer(self, completion: str, row: Mapping[str, object]) -> str | None:
        """The letter. For a vote."""
        return chosen_letter(completion)


reward = ChoiceReward()


def chosen_letter(completion: str) -> str | None:
    """The letter in the last box after the thinking; else of the last "answer is X"; else one standing alone."""
    if (text := answer_part(completion)) is None:
        return None
    if (boxed := last_boxed(text)) is not None:
        match = _LABELLED.match(boxed)
        return (match[1] or match[2]).upper() if match else None
    if stated := _STATED.findall(text):
        return str(stated[-1]).upper()
    match = _ALONE.fullmatch(text)
    return match[1] if match else None
