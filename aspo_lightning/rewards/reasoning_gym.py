"""reasoning-gym's own verifiers (100+ procedural tasks)."""

from functools import cache
from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

from aspo_lightning.rewards.thinking import answer_part


def reward(completion: str, row: dict[str, Any]) -> float:
    """What the task's verifier gives for the answer, 0 to 1.

    The answer is what the last <answer> tag holds; without one, all of the completion after its thinking.

    Args:
        completion: the model's text.
        row: a reasoning-gym entry; its ``metadata.source_dataset`` names the verifier.
    """
    judged = answer(completion, row)
    return 0.0 if judged is None else _verifier(row["metadata"]["source_dataset"])(judged, row)


def answer(completion: str, row: dict[str, Any]) -> str | None:
    """The text that is judged. For a vote."""
    if (text := answer_part(completion)) is None:
        return None
    tagged = extract_answer(text)
    return text.strip() if tagged is None else tagged


reward.answer = answer  # type: ignore[attr-defined]


@cache
def _verifier(name: str):
    return reasoning_gym.get_score_answer_fn(name)
