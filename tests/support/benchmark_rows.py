"""Hand-written rows in the real schema of each benchmark, with a right and a wrong completion."""

import base64
import json
import pickle
import zlib


def packed(text) -> str:
    """As LiveCodeBench keeps its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(text))).decode()


def live(id, date, starter="", tests=(("1 2\n", "3\n"),), kind="stdin", metadata="{}"):
    cases = [{"input": given, "output": expected, "testtype": kind} for given, expected in tests]
    return {
        "question_title": "Sum",
        "question_content": f"Print the sum of two numbers. ({id})",
        "platform": "atcoder",
        "question_id": id,
        "contest_id": "abc1",
        "contest_date": date,
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(cases[:1]),
        "private_test_cases": packed(json.dumps(cases[1:])),
        "metadata": metadata,
    }


STARTER = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "
METHOD = live(
    "3001",
    "2024-12-01T00:00:00",
    STARTER,
    (("1\n2", "3"), ("4\n5", "9")),
    "functional",
    json.dumps({"func_name": "add"}),
)
STDIN = live("abc1_a", "2025-02-01T00:00:00", "", (("1 2\n", "3\n"), ("4 5\n", "9\n")))
ADD = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
ADD_METHOD = f"```python\n{STARTER}return a + b\n```"
# By benchmark: (row, a right answer, a wrong one).
ROWS = {
    "aime24": [
        (
            {"id": 60, "problem": "Find $x$.", "solution": "So.", "answer": "204", "url": "u", "year": "2024"},
            r"so $\boxed{204}$",
            r"\boxed{203}",
        ),
        ({"id": 61, "problem": "Find $y$.", "solution": "", "answer": "025", "url": "u", "year": "2024"}, "25", "52"),
    ],
    "aime25": [({"id": "0", "problem": "Find the sum of all bases.", "answer": "70"}, r"\boxed{70}", r"\boxed{7}")],
    "amc23": [({"id": 0, "question": "Cities $A$ and $B$", "answer": 27.0, "url": "u"}, r"\boxed{27}", r"\boxed{2}")],
    "math500": [
        (
            {
                "problem": "Convert $(0,3)$ to polar coordinates.",
                "solution": "So.",
                "answer": r"\left( 3, \frac{\pi}{2} \right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "test/precalculus/807.json",
            },
            r"\boxed{(3, \pi/2)}",
            r"\boxed{(3, \pi)}",
        ),
    ],
    "minerva": [
        (
            {"question": "What is the power in erg/s?", "answer": "4.5e33"},
            r"\boxed{4.5 \times 10^{33}}",
            r"\boxed{4.5}",
        ),
        ({"question": "Find the frequency.", "answer": r"\frac{1}{2}"}, r"\boxed{0.5}", r"\boxed{2}"),
    ],
    "olympiadbench": [
        (
            {
                "id": 1606,
                "question": "Find all $k$.",
                "solution": ["So."],
                "final_answer": ["$1,-1$"],
                "context": None,
                "is_multiple_answer": True,
                "unit": None,
                "answer_type": "Numerical",
                "error": None,
            },
            r"\boxed{-1, 1}",
            r"\boxed{1}",
        ),
    ],
    "livecodebench_v5": [(METHOD, ADD_METHOD, ADD)],
    "livecodebench_v6": [(STDIN, ADD, "```python\nprint(3)\n```")],
    "humaneval": [
        (
            {
                "task_id": "HumanEval/0",
                "prompt": 'def add(a, b):\n    """The sum."""\n',
                "canonical_solution": "    return a + b\n",
                "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
                "entry_point": "add",
            },
            "```python\ndef add(a, b):\n    return a + b\n```",
            "```python\ndef add(a, b):\n    return a - b\n```",
        )
    ],
    "gpqa_diamond": [
        (
            {
                "Question": "Which particle has no charge?",
                "Correct Answer": "neutron",
                "Incorrect Answer 1": "proton",
                "Incorrect Answer 2": "electron",
                "Incorrect Answer 3": "positron",
            },
            None,
            None,
        )
    ],
    "arc_challenge": [
        (
            {
                "id": "Mercury_7175875",
                "question": "Which is a metal?",
                "choices": {"text": ["wood", "iron", "glass", "clay"], "label": ["A", "B", "C", "D"]},
                "answerKey": "B",
            },
            r"\boxed{B}",
            r"\boxed{A}",
        ),
        (
            {
                "id": "MCAS_2006_9_44",
                "question": "Which is liquid?",
                "choices": {"text": ["ice", "steam", "water", "snow"], "label": ["1", "2", "3", "4"]},
                "answerKey": "3",
            },
            "The answer is C.",
            r"\boxed{A}",
        ),
    ],
    "mmlu_pro": [
        (
            {
                "question_id": 70,
                "question": "Typical restrictions are on which of these?",
                "options": [f"option {i}" for i in range(10)],
                "answer": "I",
                "answer_index": 8,
                "cot_content": "",
                "category": "business",
                "src": "ori_mmlu-business_ethics",
            },
            r"\boxed{I}",
            r"\boxed{J}",
        )
    ],
}
