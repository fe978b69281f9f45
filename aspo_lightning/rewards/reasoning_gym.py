"""reasoning-gym's own verifiers (100+ procedural tasks)."""

from collections.abc import Callable, Mapping
from functools import cache

import reasoning_gym
from reasoning_gym.utils import extract_answer

from aspo_lightning.rewards.thinking import answer_part


class ReasoningGymReward:
    """Has the task's own verifier judge the answer.

    The answer is what the last <answer> tag holds; without one, all of the completion after its thinking.
    """

    def __call__(self, completion: str, row: Mapping[str, object]) -> float:
        """What the verifier gives, 0 to 1.

        Args:
            completion: the model's text.
            row: a reasoning-gym entry; its ``metadata.source_dataset`` names the verifier.
        """
        judged = self.answer(completion, row)
        return 0.0 if judged is None else _verifier(_source(row))(judged, row)

    def answer(self, completion: str, row: Mapping[str, object]) -> str | None:
        """The text that is judged. For a vote."""
        if (text := answer_part(completion)) is None:
            return None
        tagged = extract_answer(text)
        return text.strip() if tagged is None else tagged


reward = ReasoningGymReward()


def _source(row: Mapping[str, object]) -> str:
    metadata = row["metadata"]
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata is a {type(metadata).__name__}, not an object")
    return str(metadata["source_dataset"])


@cache
def _verifier(name: str) -> Callable[[str, Mapping[str, object]], float]:
    return reasoning_gym.get_score_answer_fn(name)
