"""The prompts of a run, as the data module sets them up: what is taken out of training, and what is refused."""

import json
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from transformers import AutoTokenizer

from aspo_lightning import ASPOModule, RolloutDataModule
from aspo_lightning.curriculum import RisingLevels
from aspo_lightning.engines import VLLMEngine
from aspo_lightning.errors import ConfigError
from aspo_lightning.tasks import Dataset
from aspo_lightning.tasks.base import Task, training_prompts
from tests.support.dataset_rows import dapo_row, verl_row

CONFIGS = Path(__file__).parent.parent / "configs"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shipped(config: dict, folder: Path, rows: list[dict]) -> Task:
    """A task of a shipped config, with its path turned to a file of these rows."""
    config["init_args"]["path"] = write(folder / "rows.jsonl", *rows)
    parser = ArgumentParser()
    parser.add_argument("--task", type=Task)
    return parser.instantiate(parser.parse_object({"task": config})).task


PROBLEM = "Find the number of triples with $xyz = 108$, and $x+y \\geq 2$."
RESPACED = "Find the  number of triples with $xyz=108$, and $x + y \\geq 2$ .\n"
TRAIN = {
    "deepscaler": lambda question: {"problem": question, "answer": "4", "solution": "So."},
    "skywork_or1": lambda question: verl_row(question, '["4"]', 0),
    "dapo": lambda question: dapo_row(question, "4", "a"),
}
EVALUATED = {
    "aime24": {"id": 60, "problem": RESPACED, "solution": "So.", "answer": "204", "url": "u", "year": "2024"},
    "amc23": {"id": 0, "question": RESPACED.upper(), "answer": 27.0, "url": "u"},
}


@pytest.mark.parametrize("benchmark", EVALUATED)
@pytest.mark.parametrize("source", TRAIN)
def test_the_shipped_pair_doesnt_train_on_what_it_evaluates(source, benchmark, tmp_path, tiny_model):
    recipe = yaml.safe_load((CONFIGS / "recipes" / "math_1.5b.yaml").read_text())["data"]["train"]
    assert recipe["init_args"]["tasks"].keys() == TRAIN.keys()
    evaluation = yaml.safe_load((CONFIGS / "eval" / "math.yaml").read_text())["data"]["val"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [TRAIN[source](question) for question in (PROBLEM, "Find $x$ if $x + 1 = 2$.")]
    (tmp_path / "train").mkdir()
    train = shipped(recipe["init_args"]["tasks"][source], tmp_path / "train", rows).prompts(tokenizer)
    held_out = shipped(evaluation[benchmark], tmp_path, [EVALUATED[benchmark]]).prompts(tokenizer)
    assert training_prompts(train, [held_out]) == train[1:]


ODD = "tests.support.rewards.parity"


def data_module(model, folder, **settings) -> RolloutDataModule:
    rows = [{"question": f"{i}+1", "answer": i + 1, "level": i // 6} for i in range(10)]
    path = write(folder / "sums.jsonl", *rows)
    settings = {"train": Dataset(path, level="level", reward=ODD, chat=False), **settings}
    return RolloutDataModule(
        model, prompts_per_phase=4, optimizer_steps=2, max_prompt_length=8, max_completion_length=8, **settings
    )


def refused(data: RolloutDataModule, stage: str) -> str:
    try:
        with pytest.raises(ConfigError) as error:
            data.setup(stage)
    finally:
        data.close()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_benchmark_of_long_prompts_alone_is_refused_by_name(tiny_model, tmp_path):
    long = write(
        tmp_path / "long.jsonl", {"question": "111111+1", "answer": 2}, {"question": "11111111+1", "answer": 3}
    )
    data = data_module(tiny_model, tmp_path, val={"sums": Dataset(long, reward=ODD)})
    message = "All 2 prompts of data.val.sums are over data.max_prompt_length 8: the shortest has 10 tokens. Raise it."
    assert refused(data, "validate") == message


def test_levels_that_cant_fill_a_phase_are_refused_before_it_starts(tiny_model, tmp_path):
    """Of six and four problems, one of the four held out."""
    held_out = write(tmp_path / "val.jsonl", {"question": "7 + 1", "answer": 8})
    data = data_module(
        tiny_model, tmp_path, curriculum=RisingLevels(), val={"sums": Dataset(held_out, reward=ODD, chat=False)}
    )
    assert "Level 1 of the training task has 3 prompts, fewer than data.prompts_per_phase 4" in refused(data, "fit")


@pytest.mark.parametrize("where", ["train", "val"])
def test_ranks_that_share_an_engine_neither_train_nor_evaluate_with_an_environment(where, tiny_model, tmp_path):
    row = write(tmp_path / "guess.jsonl", *({"question": f"{i}?", "answer": 1} for i in range(4)))
    task = Dataset(row, reward=ODD, environment="tests.support.guessing_game.environment", chat=False)
    tasks = {"train": task} if where == "train" else {"val": {"guess": task}}
    data = data_module(tiny_model, tmp_path, engine=VLLMEngine(tensor_parallel_size=2), **tasks)
    data.trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        reload_dataloaders_every_n_epochs=1,
    )
    data.trainer.strategy.connect(ASPOModule(tiny_model))
    assert "Set tensor_parallel_size to 1, or leave the environment out" in refused(data, "fit")
