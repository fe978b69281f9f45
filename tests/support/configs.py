"""The config of a small run."""

import json
from pathlib import Path

import yaml


def tiny_config(model: str, folder: Path, **data) -> dict:
    """Two epochs of a tiny model with vLLM, with the run and its data in ``folder``."""

    def task(name: str, first: int, size: int) -> dict:
        rows = folder / f"{name}.jsonl"
        rows.write_text(
            "".join(json.dumps({"question": f"{i}+1", "answer": i + 1}) + "\n" for i in range(first, first + size))
        )
        return {"class_path": "Dataset", "init_args": {"path": str(rows), "reward": "tests.support.rewards.parity"}}

    return {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "check_val_every_n_epoch": 2,
            "default_root_dir": str(folder / "tiny"),
        },
        "model": {
            "model_name_or_path": model,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "train": task("train", 10, 40),
            "val": {"sums": task("val", 60, 5)},
            "engine": {"class_path": "VLLMEngine", "init_args": {"kv_cache_gib": 0.05}},
            "prompts_per_phase": 4,
            "group_size": 4,
            "optimizer_steps": 2,
            "max_prompt_length": 96,
            "max_completion_length": 16,
            "token_budget": 256,
            "eval_group_size": 2,
            **data,
        },
    }


def write_config(path: Path, config: dict) -> str:
    """The path, as an argument of ``--config``."""
    path.write_text(yaml.safe_dump(config))
    return str(path)
