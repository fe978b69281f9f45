"""What a run gives its loggers besides curves: settings, TensorBoard's first screen, and completions to read."""

import random
import re
from collections.abc import Sequence

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from aspo_lightning.errors import ConfigError
from aspo_lightning.identity import flat
from aspo_lightning.run.folder import RunRecord
from aspo_lightning.run.lightning import callback_of, phase_of
from aspo_lightning.types import Phase, Rollout, RolloutGroup, State

SIGNS = ("positive", "negative")
LAYOUT: dict[str, dict[str, list[str]]] = {
    "Learning": {
        "reward and accuracy": ["rollout/reward", "rollout/accuracy"],
        "entropy": ["policy/entropy"],
        "KL to the reference": ["policy/kl"],
    },
    "Trust region": {
        "clip fractions, A > 0 and A < 0": [f"policy/clip_fraction_{sign}" for sign in SIGNS],
        "dual clip, A > 0 and A < 0": [f"policy/dual_clip_fraction_{sign}" for sign in SIGNS],
        "ratios, A > 0 and A < 0": [f"policy/ratio_{sign}" for sign in SIGNS],
    },
    "Completions": {
        "length": [f"rollout/length{of}" for of in ("", "_right", "_wrong")],
        "repetition": [f"rollout/repetition_rate{of}" for of in ("", "_right", "_wrong")],
        "truncated": ["rollout/truncated_fraction"],
    },
    "Speed": {
        "tokens a second": [f"throughput/{part}_tokens_s" for part in ("generate", "score", "update")],
        "seconds by part": [f"time/{part}_s" for part in ("sync", "generate", "reward", "score", "update")],
    },
}
"""TensorBoard's custom scalars: charts by group, and the tags in each."""

COLUMNS = ("which", "prompt", "question", "completion", "reward", "length", "truncated")


class LoggerSetup(Callback):
    """Gives all loggers the run's settings, and TensorBoard a layout and, at the end, the settings with the results."""

    def __init__(self) -> None:
        self.settings: dict[str, object] = {}
        self.last: dict[str, float] = {}
        """The last values of what is shown beside the settings, by tag."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.last = {}  # of another fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record = callback_of(trainer, RunRecord)
        config = record.config if record else None
        settings = flat(yaml.safe_load(config)) if config else {}
        self.settings = {key: value for key, value in settings.items() if value is not None}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if trainer.is_global_zero:
                    logger.experiment.add_custom_scalars(_layout())
            else:
                logger.log_hyperparams(self.settings)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last |= {
            f"final/{tag}": float(value)
            for tag, value in trainer.callback_metrics.items()
            if tag in ("rollout/reward", "rollout/accuracy", "policy/entropy") or re.match("eval/.*/avg@", tag)
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not when training ends: a run that was killed after its last checkpoint trains no more when it is resumed.
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self.settings, self.last, trainer.global_step)

    def state_dict(self) -> State:
        return {"last": self.last}  # an epoch after a resume needn't measure all of them

    def load_state_dict(self, state_dict: State) -> None:
        self.last = dict(state_dict["last"])


def _layout() -> dict[str, dict[str, list[str | list[str]]]]:
    return {group: {title: ["Multiline", tags] for title, tags in charts.items()} for group, charts in LAYOUT.items()}


class Samples(Callback):
    """Shows some completions of an epoch to the loggers that take text or tables: TensorBoard, W&B, MLflow.

    Those with the best and the worst reward, the longest, and one at random.

    Args:
        every_n_epochs: number of epochs between those shown. 0 shows none.
        max_characters: of a completion; what is more is left out.
    """

    def __init__(self, every_n_epochs: int = 5, max_characters: int = 4000) -> None:
        if every_n_epochs < 0 or max_characters < 1:
            raise ConfigError(
                f"samples.every_n_epochs is {every_n_epochs} and samples.max_characters {max_characters}; the first "
                "must be at least 0 (which shows no completions), the second at least 1."
            )
        self.every_n_epochs, self.max_characters = every_n_epochs, max_characters

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.every_n_epochs or trainer.current_epoch % self.every_n_epochs:
            return
        rows = [
            (which, group.prompt.id, group.prompt.question, self._cut(r.text), r.reward, r.sampled_length, r.truncated)
            for which, (group, r) in chosen(phase_of(trainer)).items()
        ]
        for logger in trainer.loggers:
            show(logger, rows, trainer.global_step)

    def _cut(self, text: str) -> str:
        left = len(text) - self.max_characters
        return text if left <= 0 else f"{text[: self.max_characters]} [{left} more characters]"


def chosen(phase: Phase) -> dict[str, tuple[RolloutGroup, Rollout]]:
    """The completions to show, by what they are chosen for; of equal ones the first. The same for the same phase."""
    every = [(group, rollout) for group in phase.groups for rollout in group.rollouts]
    return {
        "best": max(every, key=lambda pair: pair[1].reward),
        "worst": min(every, key=lambda pair: pair[1].reward),
        "longest": max(every, key=lambda pair: pair[1].sampled_length),
        "random": random.Random(phase.epoch).choice(every),
    }


def show(logger: Logger, rows: Sequence[Sequence[object]], step: int) -> None:
    """Logs rows of ``COLUMNS``, if the logger takes such a thing."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("samples", markdown(rows), step)
    elif isinstance(logger, WandbLogger):
        logger.log_table("samples", columns=list(COLUMNS), data=[list(row) for row in rows])
    elif isinstance(logger, MLFlowLogger):
        data = {"step": [step] * len(rows), **dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))}
        logger.experiment.log_table(logger.run_id, data, "samples.json")


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """The rows with what the model wrote as literal text."""
    parts = []
    for row in rows:
        of = dict(zip(COLUMNS, row, strict=True))
        cut = ", truncated" if of["truncated"] else ""
        parts += [
            f"### {of['which']}: reward {of['reward']:g}, {of['length']} tokens{cut}",
            _literal(f"{of['question']}\n\n{of['completion']}"),
        ]
    return "\n\n".join(parts)


_UNPRINTABLE = re.compile(r"[^\n\t -~\u00a0-\u2027\u2030-\u2065\u206a-\ud7ff\ue000-\uffff\U00010000-\U0010ffff]")
"""Controls, line breaks of other kinds, halves of pairs, and what turns the direction of writing."""


def _literal(text: str) -> str:
    """A block that Markdown shows as it is, by its indent."""
    lines = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n")).split("\n")
    return "\n".join(f"    {line}" for line in lines)
