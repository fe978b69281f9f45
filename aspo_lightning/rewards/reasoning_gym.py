"""reasoning-gym's own verifiers (100+ procedural tasks)."""

import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Mapping
from functools import cache

import reasoning_gym
import sympy
from reasoning_gym.utils import extract_answer

from aspo_lightning.rewards.thinking import answer_part

_NAME = re.compile(r"[^\W\d]\w*")
_KNOWN = re.compile(
    r"[A-Za-z]|exp|log|ln|sqrt|[aA]bs|sin|cos|tan|cot|sec|csc|asin|acos|atan|sinh|cosh|tanh|erf|pi|Rational"
)


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
    """The task's verifier, which runs no code of the model's: some of them hand an answer to ``eval``, or to SymPy."""
    score: Callable[[str, Mapping[str, object]], float] = reasoning_gym.get_score_answer_fn(name)
    code, names = inspect.unwrap(score).__code__, score.__globals__
    if "eval" in code.co_names:
        names["eval"] = literal_eval  # a list is all that they want
    if "parse_expr" not in code.co_names or names.get("parse_expr", sympy.parse_expr) is not sympy.parse_expr:
        return score

    def judge(answer: str, row: Mapping[str, object]) -> float:
        return score(answer if is_formula(answer, str(row["answer"])) else "", row)

    return judge


def is_formula(answer: str, expected: str) -> bool:
    """Whether SymPy may read an answer, which it evaluates as Python.

    It may hold numbers, operators, single letters, elementary functions, and the names of the expected answer.
    """
    if not re.fullmatch(r"[\w\s+\-*/^().,]*", answer) or re.search(r"\.\s*[^\W\d]", answer):
        return False
    allowed = set(_NAME.findall(expected))
    return all(_KNOWN.fullmatch(name) or name in allowed for name in _NAME.findall(answer))
