"""Callbacks around evaluations: their table, and their folder of results."""

import itertools
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from aspo_lightning.errors import AspoError
from aspo_lightning.evaluation.results import TABLE, Conditions, Results
from aspo_lightning.run.callbacks import _print
from aspo_lightning.run.folder import run_folder
from aspo_lightning.run.lightning import datamodule_of, validate_now
from aspo_lightning.types import State


@runtime_checkable
class Evaluated(Protocol):
    """What an evaluation is taken from: see ``RolloutDataModule``."""

    results: Results | None

    def evaluation_settings(self) -> Conditions:
        """All that the numbers of an evaluation depend on. Collective."""
        ...


def _evaluated(trainer: Trainer) -> Evaluated:
    data = datamodule_of(trainer)
    assert isinstance(data, Evaluated)
    return data


class EvaluationReport(Callback):
    """Evaluates before the first epoch, and keeps the numbers from before through to the end of the run."""

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and trainer.enable_validation:
            validate_now(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return  # Lightning prints a table then
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("eval/") and "@" in k}
        if trainer.global_step == 0:
            self.before = metrics
        self.after = metrics
        for name, value in metrics.items():
            _print(f"{name} {value:.3f}")

    def state_dict(self) -> State:
        return {"before": self.before, "after": self.after}

    def load_state_dict(self, state_dict: State) -> None:
        self.before, self.after = state_dict["before"], state_dict["after"]


class EvaluationResults(Callback):
    """Keeps each evaluation in a folder: completions, scores of each problem, a table.

    Args:
        folder: of ``aspo test``. Those of a fit are in its run's folder, ``eval/step_N``.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = run_folder(trainer)
        if trainer.state.fn != TrainerFn.FITTING or run is None:
            return
        data = _evaluated(trainer)
        settings = data.evaluation_settings()
        for again in itertools.count():
            try:
                data.results = Results(run.evaluation(trainer.global_step, again), settings)
            except AspoError:
                continue  # of a run that was resumed from before that step, not to the bit as it was
            return

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.folder is not None
        data = _evaluated(trainer)
        data.results = Results(self.folder, data.evaluation_settings())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = _evaluated(trainer)
        if data.results:
            data.results.finish()
            data.results = None

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_epoch_end(trainer, pl_module)
        assert self.folder is not None
        _print(f"{(self.folder / TABLE).read_text()}\nResults: {self.folder}")
