"""Runs that are disturbed by the faults of faults.py, and whether they end as one that was not."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from aspo_lightning.run.curves import read_run
from aspo_lightning.run.tags import CLOCKED
from tests.support.configs import tiny_config, write_config
from tests.support.ranks import Ranks

EPOCHS = 6


class FaultyRuns:
    """Runs of one config on all ranks, each in a folder of its own."""

    def __init__(self, ranks: Ranks, model: str, **data) -> None:
        self.ranks, self.folder = ranks, ranks.folder
        self.text, self.wait = ranks.text, ranks.wait
        data = {"prompts_per_phase": 6, "curriculum": {"class_path": "PassRate"}, **data}
        self.config = tiny_config(model, self.folder, **data)
        self.config["trainer"].update(max_epochs=EPOCHS)
        if len(ranks.processes) > 1:
            self.config["trainer"].update(strategy="fsdp2", devices=len(ranks.processes))

    def start(self, name: str, *args: str, **fault) -> list[int]:
        """The process ids of a start."""
        completions = {"folder": str(self.folder / name)}
        callbacks = [
            {"class_path": "tests.support.faults.Completions", "init_args": completions},
            {"class_path": "tests.support.faults.Late"},
        ]
        if fault:
            fault["struck"] = str(self.folder / f"{name}.struck")
            callbacks.append({"class_path": "tests.support.faults.Fault", "init_args": fault})
        config = json.loads(json.dumps(self.config))
        config["trainer"]["callbacks"] = callbacks
        config["trainer"]["default_root_dir"] = str(self.folder / f"run_{name}")
        path = write_config(self.folder / f"{name}.yaml", config)
        return self.ranks.start(name, ["fit", "--config", path, *args])

    def fit(self, name: str, *args: str, **fault) -> int:
        """The exit code of a start."""
        self.start(name, *args, **fault)
        return self.wait()[0]

    def again(self, name: str, command: list[str]) -> int:
        """The exit code of a command that a start has printed."""
        self.ranks.start(name, command)
        return self.wait()[0]

    def run(self, name: str) -> Path:
        return self.folder / f"run_{name}" / "version_0"

    def check_whole(self, name: str) -> None:
        """Asserts that a run ended as one that was never disturbed: weights, optimizer, completions, curves."""
        names = ("undisturbed", name)
        assert [p.name for p in self.run(name).parent.iterdir()] == ["version_0"]
        check_same([self.run(n) for n in names], [self.folder / n for n in names], EPOCHS)
        assert [value for _, value in read_run(self.run(name))["late"]] == list(range(EPOCHS))  # each epoch once
        leftovers = [p.name for p in (self.run(name) / "checkpoints").iterdir() if p.name.endswith(".tmp")]
        assert leftovers == []


def check_same(runs: Sequence[Path], completions: Sequence[Path], epochs: int) -> None:
    """Asserts that two runs had the same completions, curves but for the clock's, weights and optimizer.

    ``completions`` are the folders of ``faults.Completions``.
    """
    ours, theirs = ({p.name: p.read_text() for p in folder.iterdir()} for folder in completions)
    assert ours == theirs
    assert len(ours) == epochs
    before, after = map(read_run, runs)
    assert before.keys() == after.keys()
    for tag in before:
        if not tag.startswith(CLOCKED):
            assert before[tag] == after[tag], tag
    ours, theirs = (state(run / "checkpoints" / "last.ckpt") for run in runs)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]) if torch.is_tensor(ours[key]) else ours[key] == theirs[key], key


def state(checkpoint: Path) -> dict:
    """All of a checkpoint by flat keys: weights, optimizer state, schedules, curriculum, loops."""
    if checkpoint.is_dir():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        whole = checkpoint.with_suffix(".whole")
        dcp_to_torch_save(checkpoint, whole)
        tensors = torch.load(whole, weights_only=False)
        whole.unlink()
        rest = torch.load(checkpoint / "meta.pt", weights_only=False)
    else:
        tensors, rest = {}, torch.load(checkpoint, weights_only=False)
    rest.pop("callbacks")  # of other folders
    found: dict = {}

    def flatten(value, key):
        if isinstance(value, dict):
            for name, part in value.items():
                flatten(part, f"{key}/{name}")
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                flatten(part, f"{key}/{i}")
        else:
            found[key] = value

    flatten({**tensors, **rest}, "")
    return {key: value for key, value in found.items() if "hparams" not in key}
