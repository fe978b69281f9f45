"""Hand-written rows in the real schema of each benchmark load by the shipped configs, and are scored right."""

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from transformers import AutoTokenizer

from aspo_lightning.datamodule import RolloutDataModule
from aspo_lightning.errors import ConfigError
from aspo_lightning.rewards.choice import reward as choice_reward
from aspo_lightning.rewards.code import parse_tests
from aspo_lightning.rewards.code import reward as code_reward
from aspo_lightning.rewards.math import reward as math_reward
from aspo_lightning.rollouts.settings import RolloutSettings

EVAL = Path(__file__).parent.parent / "configs" / "eval"
PAPERS = ("math", "code", "ood")
CONFIGS = {name: yaml.safe_load((EVAL / f"{name}.yaml").read_text())["data"] for name in PAPERS}
SCORES = {"math": math_reward, "code": code_reward, "choice": choice_reward}


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


def data_module(model, folder, benchmark, rows):
    """What `aspo test --only BENCHMARK` makes of a shipped config, its path turned to a file."""
    (config,) = (c for c in CONFIGS.values() if benchmark in c["val"])
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = json.loads(json.dumps(config["val"][benchmark]))
    for settings in task["init_args"].get("tasks", {"": task}).values():
        settings["init_args"]["path"] = str(file)
    data = {
        **config,
        "val": {benchmark: task},
        "eval_group_size": {benchmark: config["eval_group_size"][benchmark]},
        "model_name_or_path": model,
    }
    parser = ArgumentParser()
    parser.add_class_arguments(RolloutDataModule, "data", instantiate=True)
    return parser.instantiate(parser.parse_object({"data": data})).data


def test_every_benchmark_has_rows_here():
    assert {path.stem for path in EVAL.iterdir()} == {*PAPERS, "quickstart"}
    assert {name for config in CONFIGS.values() for name in config["val"]} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_real_rows_are_scored(name, tmp_path, tiny_model):
    rows = [row for row, _, _ in ROWS[name]]
    data = data_module(tiny_model, tmp_path, name, rows)
    prompts = data.val_tasks[name].prompts(AutoTokenizer.from_pretrained(tiny_model))
    if name == "livecodebench_v5":  # its three files are one here
        prompts = prompts[:1]
    for prompt, (row, right, wrong) in zip(prompts, ROWS[name], strict=True):
        text = row.get("problem") or row.get("question_content") or row.get("question") or row.get("prompt")
        assert (text or row["Question"]) in prompt.text
        if right is None:
            right, wrong = rf"\boxed{{{prompt.row['answer']}}}", r"\boxed{E}"
            assert f"{prompt.row['answer']}. neutron\n" in prompt.text
        (path,) = prompt.rewards
        score = SCORES[path.split(".")[2]]
        assert (score(right, prompt.row), score(wrong, prompt.row)) == (1, 0)


def test_the_settings_are_the_papers():
    assert CONFIGS["math"]["eval_group_size"] == {
        "aime24": 64,
        "aime25": 64,
        "amc23": 64,
        "math500": 4,
        "minerva": 8,
        "olympiadbench": 4,
    }
    assert CONFIGS["code"]["eval_group_size"] == {"livecodebench_v5": 8, "livecodebench_v6": 16, "humaneval": 1}
    assert {config["eval_max_completion_length"] for config in CONFIGS.values()} == {32768}
    assert RolloutSettings().eval_temperature == 0.8
    assert not any("eval_temperature" in config for config in CONFIGS.values())


@pytest.mark.parametrize(
    ("name", "dates", "kept"),
    [
        ("livecodebench_v5", ["2024-07-31T00:00:00", "2024-08-01T00:00:00", "2025-01-31T23:00:00"], [1, 2]),
        ("livecodebench_v6", ["2025-01-31T00:00:00", "2025-02-01T00:00:00", "2025-05-01T00:00:00"], [1]),
    ],
)
def test_a_window_keeps_its_dates(name, dates, kept, tmp_path, tiny_model):
    data = data_module(tiny_model, tmp_path, name, [live(f"q{i}", date) for i, date in enumerate(dates)])
    prompts = data.val_tasks[name].prompts(AutoTokenizer.from_pretrained(tiny_model))
    assert sorted({p.id.rpartition("/")[2] for p in prompts}) == [f"q{i}" for i in kept]


def test_an_empty_window_and_a_missing_column_are_told(tmp_path, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    old = data_module(tiny_model, tmp_path, "livecodebench_v6", [live("q", "2020-01-01")])
    with pytest.raises(ConfigError, match="no rows with contest_date from 2025-02-01 to 2025-05-01"):
        old.val_tasks["livecodebench_v6"].prompts(tokenizer)
    wrong = data_module(tiny_model, tmp_path, "livecodebench_v6", [live("q", 5)])
    with pytest.raises(ConfigError, match="'contest_date' is 5, which can't be compared with '2025-02-01'"):
        wrong.val_tasks["livecodebench_v6"].prompts(tokenizer)
    other = data_module(tiny_model, tmp_path, "aime24", [{"question": "?", "answer": "1"}])
    with pytest.raises(ConfigError, match="rows.jsonl:1 has no 'problem'. Its columns are question, answer"):
        other.val_tasks["aime24"].prompts(tokenizer)


def test_packed_tests_hold_text_only():
    with pytest.raises(ValueError, match="nothing but text"):
        list(parse_tests(packed(eval)))
    with pytest.raises(ValueError, match="not text"):
        list(parse_tests(packed([1])))
