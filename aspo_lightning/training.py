"""What a Trainer needs to train an ASPOModule on a RolloutDataModule; `aspo fit` gives it the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from aspo_lightning.evaluation.callbacks import EvaluationReport, EvaluationResults
from aspo_lightning.run.callbacks import BestCheckpoint, PhaseReport, RunCheckpoint
from aspo_lightning.run.checkpoints import AtomicCheckpointIO, trained_steps
from aspo_lightning.run.folder import RunRecord, last_run, new_run
from aspo_lightning.run.guards import CollapseGuard, GracefulStop, NonFiniteGuard, RatioCanary
from aspo_lightning.run.loggers import LoggerSetup, Samples
from aspo_lightning.run.rollout_log import RolloutLog

GUARDS = {"non_finite": NonFiniteGuard, "ratio_canary": RatioCanary, "collapse": CollapseGuard}
KEPT = {"rollout_log": RolloutLog, "samples": Samples}
SAVED = {"best": BestCheckpoint, "checkpoint": RunCheckpoint}
CALLBACKS = {**GUARDS, **KEPT, **SAVED}
"""Those that have settings, by the key of these."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "reload_dataloaders_every_n_epochs": 1,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "inference_mode": False,  # in inference mode sharded weights can do less
    "log_every_n_steps": 1,
    "gradient_clip_val": 1.0,
    "max_epochs": 100,
}
"""Settings of Lightning's Trainer that differ from its own defaults."""

CHECKPOINT_DEFAULTS: dict[str, Any] = {
    "monitor": "step",  # the newest two: one may turn out to be damaged
    "mode": "max",
    "save_top_k": 2,
    "filename": "epoch_{epoch:05d}",
    "auto_insert_metric_name": False,
    "save_last": "link",
    "save_on_train_epoch_end": True,
    "enable_version_counter": False,
}
"""The same of its checkpoints."""


def trainer_settings(root: str | Path = "runs/aspo", *, resume: bool = False) -> dict[str, Any]:
    """Settings for a plain Trainer: ``Trainer(**trainer_settings("runs/mine"), ...)``.

    The run's folder is made below ``root``: curves for TensorBoard, checkpoints, completions, and evaluations. To have
    other callbacks, loggers or plugins as well, add them to the lists in the dict.

    Args:
        root: where runs are.
        resume: the newest run there is continued in its folder; ``trainer.fit`` then gets ``ckpt_path="last"``.

    Raises:
        ConfigError: if there is no run to resume.
    """
    run = last_run(Path(root)) if resume else new_run(Path(root))
    # TensorBoard shows what was logged after the checkpoint once.
    purge_step = trained_steps(run.newest_checkpoint()) if resume else None
    parts = {key: kind() for key, kind in {**GUARDS, **KEPT, "best": BestCheckpoint}.items()}
    parts["checkpoint"] = RunCheckpoint(dirpath=run.checkpoints, **CHECKPOINT_DEFAULTS)
    return {
        **TRAINER_DEFAULTS,
        "default_root_dir": str(root),
        "callbacks": callbacks(parts, RunRecord(run)),
        "logger": [TensorBoardLogger(run.path, name="", version="", default_hp_metric=False, purge_step=purge_step)],
        "plugins": [AtomicCheckpointIO()],
    }


def callbacks(parts: Mapping[str, Callback], record: RunRecord | None, saves: bool = True) -> list[Callback]:
    """In the order in which they work.

    Args:
        parts: by the keys of ``CALLBACKS``.
        record: of the run. None: nothing is kept.
        saves: whether checkpoints are.
    """
    return [
        *([record, LoggerSetup()] if record else []),
        *(parts[key] for key in GUARDS),
        PhaseReport(),
        *(parts[key] for key in KEPT),
        EvaluationReport(),
        EvaluationResults(),
        GracefulStop(),
        # The best first: the others' files hold its state.
        *(parts[key] for key in SAVED if saves),
    ]
