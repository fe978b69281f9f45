"""Hand-written rows in the real schema of each benchmark load by the shipped configs, and are scored right."""

import json
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
from tests.support.benchmark_rows import ROWS, live, packed

EVAL = Path(__file__).parent.parent / "configs" / "eval"
PAPERS = ("math", "code", "ood")
CONFIGS = {name: yaml.safe_load((EVAL / f"{name}.yaml").read_text())["data"] for name in PAPERS}
SCORES = {"math": math_reward, "code": code_reward, "choice": choice_reward}


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
