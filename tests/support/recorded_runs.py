"""Runs whose ranks record what they saw, see rank_recorder.py, and how far two records are apart."""

import copy
from pathlib import Path

import torch

from tests.support.configs import tiny_config, write_config

SHARDED = ["--trainer.strategy", "fsdp2", "--trainer.devices"]


class RecordedRuns:
    """Runs of one config; each is recorded by rank, in a folder of its own."""

    def __init__(self, model: str, folder: Path, data: dict | None = None, **model_settings) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        config = tiny_config(model, folder, prompts_per_phase=6, no_spread="keep", **(data or {}))
        # SGD: AdamW would make steps of full size out of the rounding of gradients near zero.
        config["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
        config["model"].update(model_settings)
        config["trainer"].update(max_epochs=3, limit_val_batches=0)
        config["checkpoint"] = {"save_top_k": -1}
        self.config = config

    def command(self, name: str, *args: str, **recorder) -> list[str]:
        config = copy.deepcopy(self.config)
        config["trainer"]["callbacks"] = [
            {
                "class_path": "tests.support.rank_recorder.RankRecorder",
                "init_args": {"folder": str(self.folder / name), **recorder},
            }
        ]
        config["trainer"]["default_root_dir"] = str(self.folder / f"run_{name}")
        return ["fit", "--config", write_config(self.folder / f"{name}.yaml", config), *args]

    def records(self, name: str) -> list[dict]:
        return [torch.load(path, weights_only=False) for path in sorted((self.folder / name).iterdir())]

    def checkpoint(self, name: str, epoch: int) -> Path:
        return self.folder / f"run_{name}" / "version_0" / "checkpoints" / f"epoch_{epoch:05d}.ckpt"


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def distance(ours: dict, theirs: dict) -> float:
    assert list(ours) == list(theirs)
    return max(relative(ours[name], theirs[name]) for name in theirs)
