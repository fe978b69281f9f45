"""Mathematical answers, compared by math-verify."""

import json
import re
from collections.abc import Iterator, Mapping

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from aspo_lightning.rewards.thinking import answer_part

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_THIN_SPACE = re.compile(r"(?<=\d)\\[,;:! ]\s*(?=\d)")
_EXPONENT = re.compile(r"^([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)$")
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_LAYOUT = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox)\b|\\q?quad\b|\\[,;:! \\()\[\]]|\*\*|[$~&{}]")
# Between boxes that stand together, layout aside: nothing, ",", "and x =", "for part (a) and". Not ", then", "=".
_LINK = re.compile(r"\s*(?:[,;]?\s*(?:and|or)?\s*(?:[^\s=]+\s*=)?|[^.,;:?!]*\b(?:and|or))\s*")
_LONGEST_LINK = 70
_LONGEST_ANSWER = 2_000
"""Characters. A longer one isn't an answer, and could keep the parser busy; of unboxed text only that much is read."""


class MathReward:
    """Compares the completion's answer with the reference.

    The answer is the last boxed expression after the thinking; without one, the last that math-verify finds there.
    Several boxes that stand together, as in "\\boxed{1} and \\boxed{2}", are one answer. Units, percent signs and
    formatting don't count. The reference 1,22 is two numbers or, as for math-verify, 1.22. One that is a list of texts
    (or the JSON of one, as Skywork-OR1 has) accepts any of them.

    Raises:
        ValueError: for an answer of more than 2,000 characters.
    """

    def __call__(self, completion: str, row: Mapping[str, object]) -> float:
        """1.0 if the completion's answer equals ``row["answer"]``, else 0.0."""
        found = _parsed(completion)
        return float(any(verify(gold, found) for text in accepted_answers(row["answer"]) for gold in _readings(text)))

    def answer(self, completion: str, row: Mapping[str, object]) -> str | None:
        """What the completion answers, as math-verify writes it: 1/2 for ``\\frac12`` too. For a vote."""
        found = _parsed(completion)
        return str(found[0]) if found else None


reward = MathReward()


def _parsed(completion: str) -> list[object]:
    """The completion's answer as math-verify holds it; nothing if there is none."""
    if (text := answer_part(completion)) is None:
        return []
    boxes = list(dict.fromkeys(last_boxes(text)))
    if not boxes:
        return parse(text[-_LONGEST_ANSWER:], _EXTRACTION)
    if (length := sum(map(len, boxes))) > _LONGEST_ANSWER:
        raise ValueError(f"an answer of {length} characters")
    first, *others = map(_plain, boxes)
    found = _parse_boxed(first)
    same = all(verify(found, _parse_boxed(other)) for other in others)  # one answer, written in several ways
    return found if same else _parse_boxed(", ".join([first, *others]))


def _readings(reference: str) -> Iterator[list[object]]:
    yield _parse_boxed(_plain(reference))
    if _DECIMAL_COMMA.fullmatch(reference.strip()):
        yield parse(reference, _EXTRACTION)  # outside of LaTeX math-verify takes 1,22 for 1.22, and 1,234 for 1234


def _parse_boxed(text: str) -> list[object]:
    return parse(f"\\boxed{{{text}}}", _EXTRACTION)


def accepted_answers(reference: object) -> list[str]:
    """The texts of which one is right."""
    if isinstance(reference, str) and reference.startswith('["'):
        reference = json.loads(reference)
    if isinstance(reference, list):
        return [str(item) for item in reference]
    return [str(reference)]


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` or ``\fbox{...}`` holds."""
    return boxes[-1] if (boxes := last_boxes(text)) else None


def last_boxes(text: str) -> list[str]:
    r"""What the last complete ``\boxed{...}`` or ``\fbox{...}`` holds, and those before it that stand together with it.

    Takes time in proportion to the text.
    """
    open_braces: list[int] = []
    boxes: list[tuple[int, int]] = []  # in the order of their ends
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if text.endswith(("\\boxed", "\\fbox"), max(0, start - 6), start):
                boxes.append((start, match.start()))
    together = [max(boxes)] if boxes else []
    for start, end in reversed(boxes):
        if end < together[-1][0]:  # else it holds one of these, or is held
            if not _stand_together(text[end + 1 : together[-1][0]]):
                break
            together.append((start, end))
    return [text[start + 1 : end] for start, end in reversed(together)]


def _stand_together(between: str) -> bool:
    """Whether a box that ends before this text and one whose brace opens after it are one answer."""
    if len(between) > _LONGEST_LINK:
        return False
    link = between.removesuffix("\\boxed").removesuffix("\\fbox")
    return _LINK.fullmatch(_LAYOUT.sub(" ", link)) is not None


def _plain(text: str) -> str:
    """Without thin spaces between digits and a full stop at the end; 4.5e33 (Minerva) as a power of ten."""
    text = _THIN_SPACE.sub("", text.strip().removesuffix("."))
    return _EXPONENT.sub(r"\1 \\cdot 10^{\2}", text)
