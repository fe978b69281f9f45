"""What reaches into Lightning beyond what it documents: each behind one name, or listed in ``OVERRIDDEN``.

tests/test_private_names.py says whether all of it is still there.
"""

from datetime import timedelta
from subprocess import Popen
from typing import TypeVar

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aspo_lightning.types import Phase

OVERRIDDEN: tuple[tuple[type, str], ...] = (
    (LightningCLI, "_parse_ckpt_path"),
    (LightningCLI, "_parser"),
    (LightningCLI, "_prepare_subcommand_parser"),
    (ModelParallelStrategy, "_get_process_group_backend"),
)
"""Methods that subclasses override or call: ``cli.fit.ASPOCLI``, ``fsdp.FSDP2Strategy``."""

C = TypeVar("C", bound=Callback)


def callback_of(trainer: Trainer, kind: type[C]) -> C | None:
    """The first callback of a kind, if there is one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """The data module that is fitted, validated or tested."""
    datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule


def phase_of(trainer: Trainer) -> Phase:
    """The phase of the current epoch."""
    phase = getattr(datamodule_of(trainer), "phase", None)
    assert isinstance(phase, Phase)
    return phase


def language_model(module: LightningModule) -> PreTrainedModel:
    """The policy that the module trains."""
    lm = getattr(module.policy, "lm", None)
    assert isinstance(lm, PreTrainedModel)
    return lm


def tokenizer_of(trainer: Trainer) -> PreTrainedTokenizerBase:
    """That of the data module."""
    tokenizer = getattr(datamodule_of(trainer), "tokenizer", None)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def trainer_of(module: LightningModule) -> Trainer | None:
    """The Trainer that has the module; ``module.trainer`` raises where there is none."""
    return module._trainer


def started_ranks(strategy: Strategy) -> list[Popen[bytes]]:
    """The processes that this one has started for the other ranks of its machine, from rank 1 on."""
    return getattr(strategy.launcher, "procs", [])


def time_limit(strategy: Strategy) -> timedelta | None:
    """How long its ranks wait for one another. None: it has none of its own."""
    return getattr(strategy, "_timeout", None)


def next_epoch(trainer: Trainer) -> int:
    """The epoch whose dataloader Lightning asks for.

    Not ``current_epoch``: on resume Lightning asks first while that still is the epoch already finished.
    """
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined, no-any-return]


def accumulate(trainer: Trainer, micro_batches: int) -> None:
    """Has each optimizer step take this many micro-batches, as Lightning's GradientAccumulationScheduler does."""
    trainer.accumulate_grad_batches = micro_batches


def no_stop_before(trainer: Trainer, step: int) -> None:
    """Has whatever stops a run (max_steps, max_time, EarlyStopping) wait for the end of the phase, at ``step``.

    A phase stopped within could not be resumed: it is sampled by weights that are gone.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.min_steps = max(loop.min_steps or 0, step)
    if trainer.global_step < loop.max_steps < step:
        loop.max_steps = step


def log_epoch(trainer: Trainer) -> None:
    """Writes what was measured in the epoch that ends, whoever logged it.

    Lightning does so after the epoch's checkpoint: a run killed in between would be resumed with a gap in its curves.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped -= 1  # the step of the last batch, as Lightning has it
    trainer._logger_connector.update_train_epoch_metrics()
    loop._batches_that_stepped += 1
    loop._results.clear()  # or it would be written again
    for logger in trainer.loggers:
        logger.save()  # some write to disk now and then only


def validate_now(trainer: Trainer) -> None:
    """Runs an evaluation in the middle of a fit."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def keep_signal_handlers(trainer: Trainer) -> None:
    """Has Lightning install no signal handlers in the fit that begins.

    Its own broadcasts to the other ranks, which are busy with something else: both would wait. ``on_train_start`` would
    be too late to replace it: the first phase is sampled between the two.
    """
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    pass
