"""Mathematical answers, compared by math-verify."""

from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def reward(completion: str, row: dict[str, Any]) -> float:
    """1.0 if the completion's answer equals ``row["answer"]``, else 0.0.

    The answer is the last boxed expression behind the thinking part; without one, the last that math-verify finds.
    """
    text = completion.rpartition("</think>")[2]
    boxed = last_boxed(text)
    answer = text if boxed is None else f"\\boxed{{{boxed}}}"
    gold = parse(f"\\boxed{{{row['answer']}}}", _EXTRACTION)
    return float(verify(gold, parse(answer, _EXTRACTION)))


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` holds."""
    start = len(text)
    while (start := text.rfind("\\boxed{", 0, start)) >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : end]
    return None
