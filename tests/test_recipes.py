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
from tests.support.dataset_rows import ADD, ROWS

DATA = Path(__file__).parent.parent / "configs" / "data"

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
