"""Runs made by hand for ``aspo view``: events as Lightning writes them, and kept completions."""

import random
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from aspo_lightning.run.rollout_files import RolloutRecord, TokenRecord, rollout_path, write_rollouts
from aspo_lightning.view.runs import PANELS

TAGS = [tag for panel in PANELS for tag in panel.series]


def record(sample: int, reward: float, advantage: float | None = 0.5, **changed) -> RolloutRecord:
    """A completion."""
    made = RolloutRecord(
        prompt_id=f"chain_sum/{sample // 4}",
        sample=sample % 4,
        question=f"What is {sample} + 31?",
        completion=f"Completion number {sample} says {sample + 31}.",
        reward=reward,
        rewards={"aspo_lightning.rewards.math.math": reward, "my_package.brevity": 0.25},
        advantage=advantage,
        solved=reward == 1,
        truncated=False,
        failed=False,
        turns=1,
        length=10 + sample,
        repetition_rate=0.0,
        ratio=1.01,
        clipped=0.125,
        tokens=None,
    )
    return made | changed


def tokens(*of: tuple[str, float, float]) -> TokenRecord:
    """Tokens from (text, ratio, entropy)."""
    text, ratio, entropy = zip(*of, strict=True)
    return TokenRecord(text=list(text), ratio=list(ratio), entropy=list(entropy))


def write_events(run: Path, epochs: int, steps: int = 2, offset: float = 0.0, without: tuple[str, ...] = ()) -> None:
    """Curves; an epoch of ``steps`` optimizer steps is logged at the last of them."""
    chance = random.Random(str(offset))
    with SummaryWriter(str(run)) as writer:
        for epoch in range(epochs):
            step = steps * (epoch + 1) - 1
            writer.add_scalar("epoch", epoch, step)
            for n, tag in enumerate(t for t in TAGS if t not in without):
                value = (n + 1) * (0.2 + 0.6 * (epoch + 1) / epochs + offset) + 0.1 * chance.random()
                writer.add_scalar(tag, value, step)


def write_epoch(run: Path, epoch: int, records: list[RolloutRecord]) -> None:
    write_rollouts(rollout_path(run, epoch), records)
