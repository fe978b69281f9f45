"""Hand-written rows in the real schema of each dataset become prompts with the right answer by the shipped configs."""

import json
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from transformers import AutoTokenizer

from aspo_lightning.rewards.code import reward as code_reward
from aspo_lightning.rewards.math import reward as math_reward
from aspo_lightning.tasks import Task

DATA = Path(__file__).parent.parent / "configs" / "data"
ADD = "a, b = map(int, input().split())\nprint(a + b)"


def verl_row(question, ground_truth, index):
    return {
        "data_source": "train-math",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"index": index},
    }


def dapo_row(question, answer, index):
    frame = "Solve the following math problem step by step. The last line of your response should be of the form "
    frame += "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    frame += 'Remember to put your answer on its own line after "Answer:".'
    row = verl_row(frame.format(question), answer, index)
    return {"prompt": question, "solution": answer, "source_prompt": row.pop("prompt"), **row}


ROWS = {
    "deepscaler": [
        {"problem": r"What is $\frac{1}{2}+\frac{1}{4}$?", "answer": r"\frac{3}{4}", "solution": "Add."},
        {"problem": "How many primes are below 10?", "answer": "4", "solution": ""},
    ],
    "skywork_or1_math": [
        {**verl_row("Solve x^2 = 4 for x > 0.", '["2"]', 0), "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
        verl_row("Give an interval.", r'["(0, \\frac{1}{2}]"]', 1),
    ],
    "dapo_math": [dapo_row("What is 6*7?", "42", "a"), dapo_row("What is 2^5?", "32", "b")],
    "code_contests": [
        {
            "name": "1_A. Sum",
            "description": "Print the sum of two numbers.",
            "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
            "private_tests": {"input": [], "output": []},
            "generated_tests": {"input": ["5 6\n", "0 0\n"], "output": ["11\n", "0\n"]},
            "source": 2,
            "difficulty": 7,
            "solutions": {"language": [3], "solution": [ADD]},
            "time_limit": {"seconds": 2, "nanos": 0},
        }
    ],
    "codeforces": [
        {
            "id": "1/A",
            "title": "Sum",
            "description": "Print the sum.",
            "input_format": "Two numbers.",
            "output_format": "Their sum.",
            "interaction_format": None,
            "note": None,
            "examples": [{"input": "1 2", "output": "3"}],
            "official_tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5\n", "output": "9\n"}],
            "official_tests_complete": True,
            "time_limit": 2.0,
            "generated_checker": None,
        }
    ],
    "gpqa": [
        {
            "Question": "Which particle has no charge?",
            "Correct Answer": "neutron",
            "Incorrect Answer 1": "proton",
            "Incorrect Answer 2": "electron",
            "Incorrect Answer 3": "positron",
            "Subdomain": "Physics",
        }
    ],
    "deepcoder": {
        "primeintellect": [
            {
                "problem": "Print the sum of two numbers.",
                "solutions": [ADD],
                "tests": json.dumps([{"type": "stdin_stdout", "input": "1 2\n", "output": "3\n"}]),
            }
        ],
        "taco": [
            {
                "problem": "Print the sum of two numbers (taco).",
                "solutions": [ADD],
                "tests": json.dumps({"inputs": ["1 2\n", "4 5\n"], "outputs": ["3\n", "9\n"]}),
            }
        ],
        "lcbv5": [
            {
                "problem": "Return the sum of two numbers.",
                "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:",
                "tests": json.dumps(
                    [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}]
                ),
            }
        ],
        "codeforces": [
            {
                "problem": "Print the sum of two numbers (codeforces).",
                "tests": json.dumps([{"input": "1 2\n", "output": "3\n"}]),
            }
        ],
    },
}
RIGHT = {
    "deepscaler": [r"\boxed{0.75}", r"\boxed{4}"],
    "skywork_or1_math": [r"\boxed{2}", r"\boxed{(0, 1/2]}"],
    "dapo_math": ["So.\nAnswer: 42", r"Answer: $32$"],
}


def load(name, folder, rows) -> list:
    """The prompts that a shipped config makes of rows, with its paths turned to files in ``folder``."""
    config = yaml.safe_load((DATA / f"{name}.yaml").read_text())["data"]["train"]

    def turn(settings, rows, file):
        path = folder / f"{file}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings["init_args"]["path"] = str(path)

    if isinstance(rows, dict):
        assert config["init_args"]["tasks"].keys() == rows.keys()
        for part, settings in config["init_args"]["tasks"].items():
            turn(settings, rows[part], part)
    else:
        turn(config, rows, name)
    parser = ArgumentParser()
    parser.add_argument("--train", type=Task)
    task = parser.instantiate(parser.parse_object({"train": config})).train
    return task


def test_every_data_config_has_rows_here():
    assert {path.stem for path in DATA.glob("*.yaml")} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_real_rows_become_prompts(name, tmp_path, tiny_model):
    task = load(name, tmp_path, ROWS[name])
    prompts = task.prompts(AutoTokenizer.from_pretrained(tiny_model))
    rows = ROWS[name]
    if name == "gpqa":
        (prompt,) = prompts
        assert f"{prompt.row['answer']}. neutron\n" in prompt.text
        assert "Which particle has no charge?\n" in prompt.text
        assert prompt.rewards == {"aspo_lightning.rewards.choice.reward": 1.0}
    elif name in RIGHT:
        for prompt, row, right in zip(prompts, rows, RIGHT[name], strict=True):
            problem = row.get("problem") or (row.get("source_prompt") or row["prompt"])[0]["content"]
            assert problem in prompt.text
            assert prompt.rewards == {"aspo_lightning.rewards.math.reward": 1.0}
            assert math_reward(right, prompt.row) == 1
            assert math_reward(r"\boxed{17}", prompt.row) == 0
    else:
        assert len(prompts) == sum(map(len, rows.values())) if isinstance(rows, dict) else len(rows)
        for prompt in prompts:
            assert "the sum" in prompt.text
            assert prompt.rewards == {"aspo_lightning.rewards.code.reward": 1.0}
            method = (
                "class Solution:\n    def add(self, a, b): return a + b" if "class Solution" in prompt.text else ADD
            )
            assert code_reward(f"```python\n{method}\n```", prompt.row) == 1
            assert code_reward("```python\nprint(17)\n```", prompt.row) == 0


def test_codeforces_statements_are_put_together(tmp_path, tiny_model):
    (prompt,) = load("codeforces", tmp_path, ROWS["codeforces"]).prompts(AutoTokenizer.from_pretrained(tiny_model))
    assert "Print the sum.\n\nTwo numbers.\n\nTheir sum.\n\nWrite a Python program" in prompt.text
    assert prompt.id == "1/A"
