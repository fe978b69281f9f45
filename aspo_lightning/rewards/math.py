"""Mathematical answers, compared by math-verify."""

import json
import re
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from aspo_lightning.rewards.thinking import answer_part

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_THIN_SPACE = re.compile(r"(?<=\d)\\[,;:! ]\s*(?=\d)")
_EXPONENT = re.compile(r"^([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)$")
_LONGEST_ANSWER = 2_000
"""Characters. A longer one is no answer, and could keep the parser busy; of unboxed text only that much is read."""


def reward(completion: str, row: dict[str, Any]) -> float:
    """1.0 if the completion's answer equals ``row["answer"]``, else 0.0.

    The answer is the last boxed expression after the thinking; without one, the last that math-verify finds
    there. Units, percent signs and formatting don't count. A reference that is a list of texts (or the JSON of one, as
    Skywork-OR1 has) accepts any of them.

    Raises:
        ValueError: for an answer of more than 2,000 characters.
    """
    found = _parsed(completion)
    golds = (parse(f"\\boxed{{{_plain(gold)}}}", _EXTRACTION) for gold in accepted_answers(row["answer"]))
    return float(any(verify(gold, found) for gold in golds))


def answer(completion: str, row: dict[str, Any]) -> str | None:
    """What the completion answers, as math-verify writes it: 1/2 for ``\\frac12`` too. For a vote."""
    found = _parsed(completion)
    return str(found[0]) if found else None


reward.answer = answer  # type: ignore[attr-defined]


def _parsed(completion: str) -> list[Any]:
    """The completion's answer as math-verify holds it; nothing if there is none."""
    if (text := answer_part(completion)) is None:
        return []
    boxed = last_boxed(text)
    if boxed is None:
        return parse(text[-_LONGEST_ANSWER:], _EXTRACTION)
    if len(boxed) > _LONGEST_ANSWER:
        raise ValueError(f"an answer of {len(boxed)} characters")
    return parse(f"\\boxed{{{_plain(boxed)}}}", _EXTRACTION)


def accepted_answers(reference: Any) -> list[str]:
    """The texts of which one is right."""
    if isinstance(reference, str) and reference.startswith('["'):
        reference = json.loads(reference)
    if isinstance(reference, list):
        return [str(item) for item in reference]
    return [str(reference)]


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` or ``\fbox{...}`` holds. Takes time in proportion to the text."""
    open_braces: list[int] = []
    best = (-1, -1)
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if text.endswith(("\\boxed", "\\fbox"), max(0, start - 6), start):
                best = max(best, (start, match.start()))
    start, end = best
    return None if start < 0 else text[start + 1 : end]


def _plain(answer: str) -> str:
    """Without thin spaces between digits and a full stop at the end; 4.5e33 (Minerva) as a power of ten."""
    answer = _THIN_SPACE.sub("", answer.strip().removesuffix("."))
    return _EXPONENT.sub(r"\1 \\cdot 10^{\2}", answer)
