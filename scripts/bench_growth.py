"""How the seconds of a phase grow with its completions, their length, the prompts' length and the group size.

    python scripts/bench_growth.py [--model FOLDER --repeats 3]

One `aspo fit` (vLLM, learning rate 0) whose phases are 1, 2, 4 and 8 times as large in one measure, in turn. Everything
that engine, model and optimizer do is timed where it is called; the rest is ours and Lightning's. The slope is that of
log seconds over log size, by least squares: 1 is linear growth, less where something is shared or fixed.

Then the phase's own data at the size of a paper run, 64 prompts x 16 completions of 20,000 tokens, made up, without a
model: seconds from sampled groups to micro-batches, and the memory of both.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback
from script_tools import spread

from aspo_lightning import datamodule
from aspo_lightning.cli.main import main as aspo
from aspo_lightning.curriculum import Shuffled
from aspo_lightning.rollouts.ahead import PhaseSampler
from aspo_lightning.rollouts.loop import Rollouts
from aspo_lightning.rollouts.settings import RolloutSettings
from aspo_lightning.run.memory import peak_memory
from aspo_lightning.types import Prompt, Rollout, RolloutGroup

BASE = {"completions": 8, "completion length": 8, "prompt length": 32, "group size": 4}
TIMES = (1, 2, 4, 8)
LARGEST = {name: value * TIMES[-1] for name, value in BASE.items()}
CALLS: dict[str, float] = {}
"""Seconds by part since the phase began."""
WITHIN: list[float] = []
"""Of each timed call that is running, the seconds of those within it."""


def reward(completion: str, row: object) -> float:
    return float(sum(map(ord, completion)) % 2)


@contextmanager
def counted(part: str) -> Iterator[None]:
    """Adds the seconds of a block to a part, less those of blocks within it."""
    start = time.perf_counter()
    WITHIN.append(0.0)
    try:
        yield
    finally:
        took = time.perf_counter() - start
        CALLS[part] = CALLS.get(part, 0.0) + took - WITHIN.pop()
        if WITHIN:
            WITHIN[-1] += took


def timed(owner: object, name: str, part: str) -> None:
    """Adds the seconds of a method to a part; of a step of the optimizer without what makes the gradient."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        if closure := kwargs.get("closure"):
            kwargs["closure"] = counted("rest")(closure)
        with counted(part):
            result = method(*args, **kwargs)
        return steps(result) if isinstance(result, Iterator) else result

    def steps(iterator):
        while True:
            with counted(part):
                found = next(iterator, None)
            if found is None:
                return
            yield found

    setattr(owner, name, call)


class Clock(Callback):
    """Times the calls of engine, model and optimizer."""

    def on_fit_start(self, trainer, pl_module) -> None:
        for name in ("generate", "sync_weights", "sleep"):
            timed(trainer.datamodule.engine, name, "engine")
        for model in filter(None, (pl_module.policy, pl_module.reference)):
            timed(model, "forward", "model")
        timed(trainer.strategy, "backward", "model")
        for optimizer in trainer.optimizers:
            timed(optimizer, "step", "optimizer")
        timed(torch.nn.utils, "clip_grad_norm_", "optimizer")


class Growing(Rollouts):
    """Makes the phases of ``sizes`` in turn, and keeps the seconds of each, by part."""

    sizes: list[dict[str, int]] = []  # noqa: RUF012
    measured: list[dict[str, float]] = []  # noqa: RUF012
    began = 0.0

    def phase(self, policy, epoch, *, end=None):
        now = time.perf_counter()
        if epoch:
            self.measured.append({**CALLS, "all": now - self.began})
        CALLS.clear()
        self.began = time.perf_counter()
        size = self.sizes[min(epoch, len(self.sizes) - 1)]
        group = size["group size"]
        count = max(1, size["completions"] // group)
        self.settings = self.phases.settings = replace(
            self.settings, prompts_per_phase=count, group_size=group, max_completion_length=size["completion length"]
        )
        long = [p for p in self.every if len(p.prompt_ids) >= size["prompt length"]]
        self.phases.prompts = [replace(p, prompt_ids=p.prompt_ids[: size["prompt length"]]) for p in long[:count]]
        return super().phase(policy, epoch, end=end)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.every = self.phases.prompts


def config(model: str, folder: Path, epochs: int) -> dict:
    rows = folder / "rows.jsonl"
    words = " ".join(f"Note {i}." for i in range(LARGEST["prompt length"] // 3))
    questions = [f"What is {i} + {7 * i % 10}? {words}" for i in range(LARGEST["completions"])]
    rows.write_text("\n".join(json.dumps({"question": q, "answer": "0"}) for q in questions))
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": epochs,
            "logger": False,
            "enable_checkpointing": False,
            "default_root_dir": str(folder / "runs"),
            "callbacks": [{"class_path": "bench_growth.Clock"}],
        },
        "model": {
            "model_name_or_path": model,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0, "fused": True}},
        },
        "data": {
            "train": {
                "class_path": "Dataset",
                "init_args": {"path": str(rows), "reward": "bench_growth.reward", "chat": False},
            },
            "engine": {
                "class_path": "VLLMEngine",
                "init_args": {"kv_cache_gib": 0.5, "max_num_seqs": LARGEST["completions"]},
            },
            "prompts_per_phase": 2,
            "group_size": BASE["group size"],
            "optimizer_steps": 1,
            "no_spread": "keep",
            "max_prompt_length": 1024,
            "max_completion_length": LARGEST["completion length"],
            "token_budget": 2048,
            "reward_workers": 1,
        },
    }


def grow(model: str, repeats: int) -> None:
    points = [{**BASE, name: value * n} for name, value in BASE.items() for n in TIMES]
    for point in points:  # as many prompts, whatever their groups
        if point["group size"] > BASE["group size"]:
            point["completions"] = BASE["completions"] // BASE["group size"] * point["group size"]
    Growing.sizes = [points[0], *points * repeats, points[0]]  # the first warms up, the last ends the one before
    datamodule.Rollouts = Growing
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.yaml"
        path.write_text(yaml.safe_dump(config(model, Path(temporary), len(Growing.sizes))))
        sys.argv[1:] = ["fit", "--config", str(path)]
        aspo()
    measured = Growing.measured[1:]
    print("| | | seconds | engine | model | optimizer | rest | rest, share |\n|---|---|---|---|---|---|---|---|")
    for i, name in enumerate(BASE):
        totals, rests = [], []
        for j, n in enumerate(TIMES):
            found = measured[i * len(TIMES) + j :: len(points)][:repeats]
            parts = {part: statistics.median(f[part] for f in found) for part in ("engine", "model", "optimizer")}
            rest = statistics.median(f["all"] - f["engine"] - f["model"] - f["optimizer"] for f in found)
            total = [f["all"] for f in found]
            totals.append(statistics.median(total))
            rests.append(rest)
            columns = " | ".join(f"{seconds:.2f}" for seconds in parts.values())
            share = rest / totals[-1]
            print(f"| {name} | {BASE[name] * n} | {spread(total)} | {columns} | {rest:.3f} | {share:.1%} |")
        slopes = [np.polyfit(np.log(TIMES), np.log(seconds), 1)[0] for seconds in (totals, rests)]
        print(f"| {name} | slope | {slopes[0]:.2f} | | | | {slopes[1]:.2f} | |")


class Zeros:
    """Scores without a model."""

    def shares_prompts(self):
        return True

    def score(self, batches):
        return [torch.zeros(len(batch.targets)) for batch in batches]

    score_reference = score


def data(prompts: int, group: int, length: int) -> None:
    """The phase's own data, made up."""
    draw = random.Random(0)

    def rollout(reward: float) -> Rollout:
        ids = tuple(draw.randrange(1000, 150_000) for _ in range(length))
        return Rollout(ids, tuple(draw.random() for _ in range(length)), False, "x" * (4 * length), reward, reward == 1)

    before = peak_memory()
    groups = [
        RolloutGroup(
            Prompt(str(i), tuple(range(1000, 1500)), "", "", {}, {}),
            tuple(rollout(float(k % 2)) for k in range(group)),
        )
        for i in range(prompts)
    ]
    sampled = peak_memory()
    settings = RolloutSettings(
        prompts_per_phase=prompts,
        group_size=group,
        max_prompt_length=1024,
        max_completion_length=length,
        token_budget=length + 1024,
    )
    rollouts = Rollouts(PhaseSampler(SimpleNamespace(rank=0, world_size=1), Shuffled(), [], settings))
    start = time.perf_counter()
    phase = rollouts.train_on(groups, Zeros(), 0)
    took = time.perf_counter() - start
    tokens = sum(len(batch.targets) for batch in phase)
    print(
        f"\n{prompts} prompts x {group} completions of {length} tokens: {took:.1f} s from groups to {len(phase)} "
        f"micro-batches of {tokens} response tokens. Groups {(sampled - before) / 1e9:.2f} GB, then up to "
        f"{(peak_memory() - sampled) / 1e9:.2f} GB more."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/aspo_lightning/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    data(64, 16, 20_000)
    grow(str(Path(options.model).expanduser()), options.repeats)


if __name__ == "__main__":
    import bench_growth  # by the name that the config has: its callback and what prints share ``CALLS``

    bench_growth.main()
