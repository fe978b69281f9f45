"""Python programs, by tests: from standard input to standard output, by calls of a function, or by a test function.

The model's code runs in a process of its own in a sandbox; what is expected is compared outside of it, so that code can
only pass by answering right.
"""

import base64
import io
import json
import math
import pickle
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple, NoReturn

from aspo_lightning.rewards.inside_sandbox import decode, encode
from aspo_lightning.rewards.sandbox import Failed, Limits, Process, check_isolation, run_script
from aspo_lightning.rewards.thinking import answer_part

_FENCE = re.compile(r"```([^\n`]*)\n(.*?)```", re.DOTALL)
_PYTHON = ("", "python", "python3", "py")


class StdinTest(NamedTuple):
    """A program reads ``input`` and has to print ``output``."""

    input: str
    output: str


class CallTest(NamedTuple):
    """``function(*args)`` has to return one of ``accepted``."""

    function: str
    args: list[object]
    accepted: tuple[object, ...]


class CheckTest(NamedTuple):
    """``program`` defines check(candidate), in which ``candidate`` is the function (HumanEval)."""

    program: str
    function: str
    prompt: str
    """What a completion without a definition of the function continues."""


Test = StdinTest | CallTest | CheckTest


@dataclass(frozen=True)
class CodeReward:
    """Runs the last code block of the completion against tests."""

    isolated: bool
    """Inside the sandbox; otherwise with limits alone."""

    def check(self) -> None:
        """Raises ConfigError unless code can run here as it should."""
        if self.isolated:
            check_isolation()

    def __call__(self, completion: str, row: Mapping[str, object]) -> float:
        """1.0 if the code passes all tests, else 0.0.

        Args:
            completion: the model's text. Without a fenced block, all of it after the thinking is taken as code.
            row: ``answer`` holds the tests in any format that ``parse_tests`` reads; for HumanEval, the whole row does.
                A function's name may be in ``metadata`` (LiveCodeBench). ``time_limit`` for one test is optional:
                seconds, or CodeContests' {"seconds": ..., "nanos": ...}.
        """
        tests = list(parse_tests(row if "entry_point" in row else row["answer"], _function_name(row.get("metadata"))))
        if not tests:
            raise ValueError("the row has no tests")
        limits = Limits(seconds=_seconds(row.get("time_limit")))
        if (code := extract_code(completion)) is None:
            return 0.0
        try:
            return float(passes(code, tests, limits, isolated=self.isolated))
        except Failed:
            return 0.0


reward = CodeReward(isolated=True)

reward_without_isolation = CodeReward(isolated=False)
"""As ``reward``, with limits alone: the code can read, write and connect as this user. Not for untrusted models."""


def passes(code: str, tests: list[Test], limits: Limits, *, isolated: bool) -> bool:
    """Whether the code passes all tests. Raises Failed if it crashes or runs into a limit."""
    calls = [t for t in tests if isinstance(t, CallTest)]
    for test in tests:
        if isinstance(test, StdinTest):
            if not same_output(run_script(code, test.input.encode(), limits, isolated=isolated), test.output):
                return False
        elif isinstance(test, CheckTest):
            run_check(code, test, limits, isolated)
    return not calls or passes_calls(code, calls, limits, isolated)


def _seconds(time_limit: object) -> float:
    if isinstance(time_limit, Mapping):
        time_limit = (time_limit.get("seconds") or 0) + (time_limit.get("nanos") or 0) / 1e9
    if isinstance(time_limit, str):  # TACO: "2.0 seconds"
        time_limit = time_limit.lower().removesuffix("seconds").removesuffix("second")
    seconds = float(str(time_limit or Limits().seconds))
    if not 0 < seconds < math.inf:
        raise ValueError(f"time_limit is {time_limit!r}; it must be a number of seconds")
    return seconds


def extract_code(completion: str) -> str | None:
    """The last fenced block after the thinking; without one, all that is there. None while it's still thinking.

    Blocks of another language, such as a sample of the output, count only where there are no others.
    """
    if (text := answer_part(completion)) is None:
        return None
    blocks = [((info.split() or [""])[0].lower(), code) for info, code in _FENCE.findall(text)]
    python = [code for language, code in blocks if language in _PYTHON]
    return (python or [code for _, code in blocks] or [text])[-1]


def parse_tests(source: object, function: str | None = None) -> Iterator[Test]:
    """Reads the formats in use, as objects, as the JSON text of one, or as that text packed (LiveCodeBench).

    - {"input": text, "output": text}: DeepCoder, LiveCodeBench, CodeForces; with ``testtype`` functional and
      ``metadata.func_name`` (or ``function``), or ``type`` function_call and ``fn_name``, a function's arguments and
      result.
    - {"input": [...], "output": [...]} and {"inputs": [...], "outputs": [...], "fn_name": ...}: CodeContests, TACO.
    - {"test": program, "entry_point": name, "prompt": ...}: HumanEval.
    - a list of any of these.
    """
    if isinstance(source, str):
        source = json.loads(source if source.lstrip()[:1] in ("[", "{") else _unpack(source))
    if isinstance(source, (list, tuple)):
        for item in source:
            yield from parse_tests(item, function)
        return
    if not isinstance(source, Mapping):
        raise ValueError(f"a test is an object, not {type(source).__name__}")
    if "test" in source:
        # Some tests call helper functions of the prompt, and some the function by its own name.
        name, prompt = source["entry_point"], source.get("prompt", "")
        yield CheckTest(f"{prompt}\n{name} = candidate\n{source['test']}", name, prompt)
        return
    inputs, outputs = (source.get(f"{key}s", source.get(key)) for key in ("input", "output"))
    named = function if source.get("testtype") == "functional" else None
    function = source.get("fn_name") or _function_name(source.get("metadata")) or named
    if "inputs" not in source and (function or isinstance(inputs, str)):
        inputs, outputs = [inputs], [outputs]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("a test needs as many inputs as outputs")
    for given, expected in zip(inputs, outputs, strict=True):
        if not function:
            yield StdinTest(_text(given), _text(expected))
        elif isinstance(given, str):  # LiveCodeBench: an argument a line
            args = [json.loads(line) for line in given.split("\n") if line.strip()]
            yield CallTest(function, args, (json.loads(expected),))
        else:
            # Some rows of TACO and PRIME wrap the result in a list of one, and others don't.
            wrapped = isinstance(expected, list) and len(expected) == 1
            yield CallTest(function, list(given), (expected, expected[0]) if wrapped else (expected,))


def _function_name(metadata: object) -> str | None:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            return None
    return metadata.get("func_name") if isinstance(metadata, Mapping) else None


class _OnlyText(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"packed tests hold {module}.{name}; they may hold nothing but text")


def _unpack(source: str) -> str:
    """LiveCodeBench's private tests: a pickled text, compressed, in base64."""
    text = _OnlyText(io.BytesIO(zlib.decompress(base64.b64decode(source, validate=True)))).load()
    if not isinstance(text, str):
        raise ValueError(f"packed tests are a {type(text).__name__}, not text")
    return text


def _text(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def passes_calls(code: str, tests: list[CallTest], limits: Limits, isolated: bool) -> bool:
    """Whether each call returns what it should; all in one process, with the time limit for each of them."""
    with Process("call", code, limits, isolated=isolated, calls=len(tests)) as process:
        for test in tests:
            process.send([test.function, encode(test.args)])
            value = _decoded(process.receive())
            if not any(same_value(value, accepted) for accepted in test.accepted):
                return False
    return True


def run_check(code: str, test: CheckTest, limits: Limits, isolated: bool) -> None:
    """Runs a test function in one process against the model's code in another. Raises Failed unless it passes."""
    if not re.search(rf"\bdef\s+{re.escape(test.function)}\b", code):
        code = test.prompt + code
    with (
        Process("check", test.program, limits, isolated=isolated) as checker,
        Process("call", code, limits, isolated=isolated) as solution,
    ):
        while (message := checker.receive()) != {"passed": True}:
            if not (isinstance(message, dict) and "call" in message):
                raise ValueError("the test sent something else than a call")
            solution.send([test.function, message["call"]])
            returned = solution.receive()
            _decoded(returned)  # nothing but plain data goes to the test
            checker.send(returned)


def _decoded(message: object) -> object:
    try:
        return decode(message)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Failed("not plain data") from error


def same_output(printed: str, expected: str) -> bool:
    """Line by line and word by word, numbers by their value: whatever LiveCodeBench's checker accepts (3.0 for 3).

    Beyond that, a number expected with a fraction may differ by 1e-6 (relative, or absolute below 1), as problems of
    TACO and CodeContests allow.
    """
    left, right = ([line.split() for line in text.split("\n")] for text in (printed, expected))
    left, right = ([words for words in lines if words] for lines in (left, right))
    return len(left) == len(right) and all(
        len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(left, right, strict=True)
    )


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    try:
        whole = expected.lstrip("+-").isdigit()
        return Decimal(word) == Decimal(expected) or (not whole and _close(float(word), float(expected)))
    except (ValueError, ArithmeticError):
        return False


def same_value(value: object, expected: object) -> bool:
    """Equal in Python, as for LiveCodeBench's checker: 3 is 3.0, and True is 1. A tuple is as good as a list.

    Beyond that, a float may differ by 1e-6, as in ``same_output``.
    """
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, float) and isinstance(expected, (int, float)) and not isinstance(expected, bool):
        return _close(value, expected)
    return bool(value == expected)


def _close(a: float, b: float) -> bool:
    try:
        return a == b or (math.isfinite(a) and math.isfinite(b) and abs(a - b) <= 1e-6 * max(1.0, abs(b)))
    except OverflowError:  # a whole number beyond all floats
        return False
