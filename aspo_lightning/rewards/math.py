"""Mathematical answers, compared by math-verify."""

from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def reward(completion: str, row: dict[str, Any]) -> float:
    """1.0 if the completion's answer equals ``row["answer"]``, else 0.0.

    The answer is the last boxed expression behind the thinking part, or else the last one that parses.
    """
    text = completion.rpartition("</think>")[2]
    gold = parse(f"\\boxed{{{row['answer']}}}", _EXTRACTION)
    return float(verify(gold, parse(text, _EXTRACTION)))
