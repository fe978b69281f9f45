"""Runs made by hand for ``aspo view``: events as Lightning writes them, and kept completions."""

import json
import random
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from aspo_lightning.run.rollout_files import RolloutRecord, TokenRecord, rollout_path, write_rollouts
from aspo_lightning.view.runs import PANELS

TAGS = [tag for panel in PANELS for tag in panel.series]

SCRIPT = "<script>window.pwned = 1</script></script><img src=x onerror='window.pwned = 2'>"
HOSTILE = {
    "script": SCRIPT,
    "template": "{{ 7 * 7 }} {% raw %} ${window.pwned = 3} <!--<script>",
    "large": "<b>" + "A" * 1_000_000,
    "right to left": "\u202egnirts lanigiro eht si siht\u2066 \u200f",
    "control": "before\0after \x1b[31m",
    "broken": "half \ud83d of a pair, \ufffd and \u2028 lines",
}

POSITIVE = [("Let", 0.25), (" us", 0.5), (" add", 1.1), (":\n", 1.25), (" 54", 1.3)]
NEGATIVE = [("So", 0.7), (" the", 0.9), (" sum", 2.0), ("<b>", 5.0)]
"""Tokens and their ratios."""


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


def tokens(*of: tuple[str, float]) -> TokenRecord:
    """Tokens from (text, ratio)."""
    text, ratio = zip(*of, strict=True)
    return TokenRecord(text=list(text), ratio=list(ratio), entropy=[0.5 * i for i in range(len(of))])


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


def two_runs(folder: Path) -> tuple[Path, Path]:
    """Two runs: every epoch of the first is kept, and 0 and 3 of the second, which was trained with DAPO."""
    first, second = folder / "version_0", folder / "version_1"
    write_events(first, epochs=5, steps=2)
    write_events(second, epochs=5, steps=4, offset=0.1, without=("policy/kl", "rollout/repetition_rate"))
    for epoch in range(4):
        write_epoch(first, epoch, [record(s, s / 8, completion=f"Epoch {epoch}, number {s}.") for s in range(8)])
    hostile = [
        record(s, 0.5, completion=text, question=text, prompt_id=text[:30])
        for s, text in enumerate(HOSTILE.values(), 20)
    ]
    last = [
        record(0, 1.0, 0.5, length=30, tokens=tokens(*POSITIVE)),
        record(1, 0.0, -0.5, length=10, tokens=tokens(*NEGATIVE), failed=True),
        record(2, -1.0, -0.25, length=40, truncated=True, completion="The very worst"),
        record(3, 0.25, None, length=20, ratio=None, clipped=None, completion="Needle in a haystack"),
    ]
    write_epoch(first, 4, last + hostile)
    for epoch in (0, 3):
        few = [record(s, 0.0, 0.5, tokens=tokens(*POSITIVE)) for s in range(3)]
        write_epoch(second, epoch, few)
    dapo = {"class_path": "aspo_lightning.objectives.DAPO", "init_args": {"clip_eps_high": 0.28}}
    (second / "config.yaml").write_text(json.dumps({"model": {"objective": dapo}}))
    return first, second
