"""What a person sees of a run: phase measurements in TensorBoard, a line an epoch, accuracy before and after."""

import resource
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from tqdm.auto import tqdm


class PhaseReport(Callback):
    """Logs the measurements of each phase and prints one line an epoch."""

    def __init__(self) -> None:
        self._start = 0.0
        self._validation_start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(trainer.datamodule.phase.metrics, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)  # type: ignore[attr-defined]
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start += time.perf_counter() - self._validation_start  # not part of the update

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        update_s = time.perf_counter() - self._start
        pl_module.log("time/update_s", update_s, batch_size=1, sync_dist=True)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        _print(epoch_line(trainer.current_epoch, {**metrics, "time/update_s": update_s}))


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
        for part in ("generate", "reward", "score", "update", "sync")
        for text in show(part, f"time/{part}_s", ".1f")
    ]
    return f"epoch {epoch:4d} | " + " | ".join([*parts, "seconds: " + " ".join(seconds)])


class EvaluationReport(Callback):
    """Evaluates before the first epoch, and keeps the numbers from before through to the end of the run."""

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and trainer.enable_validation:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return  # Lightning prints a table then
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("eval/")}
        if trainer.global_step == 0:
            self.before = metrics
        self.after = metrics
        for name, value in metrics.items():
            _print(f"{name} {value:.3f}")

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = state_dict["before"], state_dict["after"]


def peak_memory_gb() -> float:
    """The most memory that this process (trainer and engine) ever held, in 10^9 bytes.

    A reward process has some 0.1 on top. What the system tells of ended children is no use: it counts the whole parent
    for each that was forked.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@rank_zero_only
def _print(line: str) -> None:
    tqdm.write(line)
