"""What a run shows and keeps: phase measurements, a line an epoch, checkpoints, the weights that did best."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm.auto import tqdm

from aspo_lightning.errors import ConfigError
from aspo_lightning.run.folder import run_folder
from aspo_lightning.run.lightning import datamodule_of, language_model, log_epoch, phase_of
from aspo_lightning.run.throughput import product_peak, update_flops


class PhaseReport(Callback):
    """Logs the measurements of each epoch (``run.tags``) and prints them as one line."""

    def __init__(self) -> None:
        self._start = 0.0
        self._validation_start = 0.0
        self._before: dict[str, Tensor] = {}
        self._peak = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else next(pl_module.parameters()).dtype
        self._peak = product_peak(dtype, pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = dict(trainer.callback_metrics)
        metrics = phase_of(trainer).metrics
        pl_module.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start += time.perf_counter() - self._validation_start  # not part of the update

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        update_s = time.perf_counter() - self._start
        batches = phase_of(trainer).micro_batches
        reached = {
            "time/update_s": update_s,
            "throughput/update_tokens_s": sum(len(batch.input_ids) for batch in batches) / update_s,
            "throughput/update_peak_share": update_flops(language_model(pl_module), batches) / update_s / self._peak,
        }
        pl_module.log_dict(reached, batch_size=1, sync_dist=True)
        metrics = measured_since(self._before, trainer)
        _print(epoch_line(trainer.current_epoch, metrics))
        log_epoch(trainer)


def measured_since(before: Mapping[str, Tensor], trainer: Trainer) -> dict[str, float]:
    """What has been measured since ``trainer.callback_metrics`` was ``before``.

    Lightning keeps the last value of what isn't measured again, such as the entropy in a phase without a useful group.
    """
    return {tag: float(value) for tag, value in trainer.callback_metrics.items() if value is not before.get(tag)}


def epoch_line(epoch: int, metrics: dict[str, float]) -> str:
    """The summary of an epoch; what wasn't measured is left out."""

    def show(label: str, key: str, form: str) -> list[str]:
        value = metrics.get(key)
        return [] if value is None else [f"{label} {value:{form}}"]

    clipped = [
        sign + f"{metrics[key]:.1%}"
        for sign, key in (("A>0 ", "policy/clip_fraction_positive"), ("A<0 ", "policy/clip_fraction_negative"))
        if key in metrics
    ]
    parts = [
        *show("reward", "rollout/reward", ".3f"),
        *show("accuracy", "rollout/accuracy", ".3f"),
        *show("entropy", "policy/entropy", ".3f"),
        *([f"clipped {' '.join(clipped)}"] if clipped else []),
    ]
    seconds = [
        text
        for part in ("wait", "generate", "reward", "score", "update", "sync")
        for text in show(part, f"time/{part}_s", ".1f")
    ]
    return f"epoch {epoch:4d} | " + " | ".join([*parts, "seconds: " + " ".join(seconds)])


class RunCheckpoint(ModelCheckpoint):
    """Keeps what a run can be resumed from: every few epochs, and when it ends, whatever the interval.

    Args:
        every_n_epochs: number of epochs between checkpoints. None: 1; 0: only when the run ends.
        settings: of Lightning's ``ModelCheckpoint``.
    """

    def __init__(self, every_n_epochs: int | None = None, **settings: Any) -> None:
        super().__init__(every_n_epochs=1, **settings)
        self.interval = 1 if every_n_epochs is None else every_n_epochs
        if self.interval < 0:
            raise ConfigError(f"checkpoint.every_n_epochs is {every_n_epochs}; it must be at least 0.")

    @property
    def state_key(self) -> str:
        return type(self).__qualname__  # a run resumed with another interval keeps its count of what to delete

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = self.interval > 0 and (trainer.current_epoch + 1) % self.interval == 0
        limits = ((trainer.current_epoch + 1, trainer.max_epochs), (trainer.global_step, trainer.max_steps))
        ends = trainer.should_stop or any(limit is not None and 0 <= limit <= reached for reached, limit in limits)
        if due or ends:
            super().on_train_epoch_end(trainer, pl_module)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights that did best on a held-out task, in the run's folder ``best``.

    Args:
        monitor: what they did best in, by its TensorBoard tag; more is better. None: avg@k of the first task.
    """

    def __init__(self, monitor: str | None = None) -> None:
        super().__init__(
            monitor=monitor,
            mode="max",
            filename="epoch_{epoch:05d}",
            auto_insert_metric_name=False,
            save_weights_only=True,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self._evaluated = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        evaluations = getattr(datamodule_of(trainer), "evaluations", {})
        tags = [f"eval/{name}/avg@{sampling.group_size}" for name, sampling in evaluations.items()]
        names = [tag.rpartition("/")[0] for tag in tags]
        if self.monitor is not None and self.monitor.rpartition("/")[0] not in names:
            raise ConfigError(
                f"best.monitor is {self.monitor!r}; known are {', '.join(tags) or 'no tasks: data.val is empty'}."
            )
        self.monitor = self.monitor or next(iter(tags), None)
        if run := run_folder(trainer):
            self.dirpath = str(run.best)
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = trainer.global_step > 0  # saved once the epoch has ended; other epochs have no new score

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluated:
            self._evaluated = False
            super().on_train_epoch_end(trainer, pl_module)


@rank_zero_only
def _print(line: str) -> None:
    tqdm.write(line)
