"""``aspo fit`` and ``aspo validate``: LightningCLI with runs, guards and checkpoints around it."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, dict_to_namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

from aspo_lightning.cli.configs import ConfigByName
from aspo_lightning.cli.ranks import wait_for_ranks
from aspo_lightning.datamodule import RolloutDataModule
from aspo_lightning.errors import ConfigError, EngineError
from aspo_lightning.evaluation.callbacks import EvaluationReport
from aspo_lightning.identity import TRAINER, counting, differences
from aspo_lightning.module import ASPOModule
from aspo_lightning.policy.settings import ModelSettings
from aspo_lightning.rollouts.settings import RolloutSettings
from aspo_lightning.run.callbacks import BestCheckpoint
from aspo_lightning.run.checkpoints import AtomicCheckpointIO, check_resumable, trained_steps
from aspo_lightning.run.disk import check_writable
from aspo_lightning.run.folder import RunFolder, RunRecord, find_checkpoint, is_run, last_run, new_run
from aspo_lightning.run.guards import GracefulStop
from aspo_lightning.run.lightning import callback_of
from aspo_lightning.run.memory import peak_memory
from aspo_lightning.training import CALLBACKS, CHECKPOINT_DEFAULTS, TRAINER_DEFAULTS, callbacks

RUN = "{run}"
"""In a logger's settings: the run's folder."""

DEFAULT_LOGGER = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"save_dir": RUN, "default_hp_metric": False},
}


class ASPOCLI(LightningCLI):
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ConfigByName, help="a YAML file, or the name of a config that `aspo configs` lists"
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.model_name_or_path", "data.model_name_or_path")
        parser.link_arguments("data.temperature", "model.temperature")
        parser.link_arguments("seed_everything", "data.seed")
        for key, callback in CALLBACKS.items():
            parser.add_class_arguments(callback, key)
        parser.set_defaults(
            {
                **{f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()},
                "trainer.default_root_dir": "runs/aspo",
                "trainer.logger": DEFAULT_LOGGER,
                "data.engine": {"class_path": "aspo_lightning.engines.VLLMEngine"},
                "data.curriculum": {"class_path": "aspo_lightning.curriculum.Shuffled"},
                **{f"checkpoint.{key}": value for key, value in CHECKPOINT_DEFAULTS.items()},
            }
        )

    def _parse_ckpt_path(self) -> None:
        """LightningCLI would read the whole checkpoint here, for hyperparameters that it doesn't have."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: object) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--allow_changes", type=bool, default=False, help="resume under a config that computes something else"
            )
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        subcommands = LightningCLI.subcommands()
        # Checkpoints are always read as weights and plain data.
        ours = {name: {*subcommands[name], "weights_only"} for name in ("fit", "validate", "test")}
        typed = next(iter(sys.argv[1:]), "")
        return {typed: ours[typed]} if typed in ours else ours  # making a parser takes most of a second

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_strategy(config.trainer.strategy)
        root = Path(config.trainer.default_root_dir or ".").expanduser()
        self.run: RunFolder | None = None
        source = Path(config.ckpt_path).expanduser() if config.get("ckpt_path") else None
        if source == Path("last"):
            source = last_run(root).path
        if source is not None:
            begins = self.subcommand == "fit" and is_run(source) and not RunFolder(source).has_checkpoints()
            config.ckpt_path = None if begins else str(find_checkpoint(source))
        if self.subcommand != "fit":
            config.trainer.logger = False  # Lightning prints a table, and `aspo test` keeps a folder
            return
        if config.trainer.fast_dev_run:
            config.trainer.logger = config.trainer.enable_checkpointing = False  # a look leaves nothing
            return
        if config.ckpt_path:
            check_resumable(Path(config.ckpt_path))
        if config.trainer.logger in (True, None):
            config.trainer.logger = dict_to_namespace(DEFAULT_LOGGER)
        check_checkpoints(config.checkpoint)
        check_writable(root, "--trainer.default_root_dir")
        resumes = source is not None and is_run(source)  # a checkpoint by its path starts a run of its own
        self.run = RunFolder(source) if source is not None and resumes else new_run(root)
        self.given = self._parser("fit").dump(config, skip_none=False)
        if source is not None and not config.allow_changes:
            before = self.run if resumes else RunFolder(Path(config.ckpt_path).parent.parent)
            check_same_computation(before, yaml.safe_load(self.given))
        steps = None
        if resumes:
            print(f"Resuming from {config.ckpt_path or 'its beginning: the run has no checkpoint yet'}")
            steps = trained_steps(Path(config.ckpt_path)) if config.ckpt_path else 0
        config.checkpoint.dirpath = str(self.run.checkpoints)
        place_loggers(config.trainer.logger, self.run, steps)

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        config = self.config_init[self.subcommand]
        settings = config.trainer
        plugins = settings.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if other := next((p for p in plugins if isinstance(p, CheckpointIO)), None):
            raise ConfigError(
                f"trainer.plugins has {type(other).__name__}, but checkpoints are written whole or not at all by "
                "AtomicCheckpointIO. Leave it out."
            )
        record = RunRecord(self.run, self.given) if self.run else None
        # Without a fit they only say whether their settings are right.
        saves = settings.enable_checkpointing is not False or self.subcommand != "fit"
        given = callbacks({key: config[key] for key in CALLBACKS}, record, saves)
        own = config.trainer.callbacks or []
        if settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in own):
            given.append(TQDMProgressBar())
        self.trainer_defaults = {"callbacks": given}
        return super().instantiate_trainer(plugins=[*plugins, AtomicCheckpointIO()], **kwargs)

    def before_fit(self) -> None:
        if self.run is not None and self.trainer.is_global_zero:
            print(f"Run {self.run.path}. If it is stopped, resume it with\n{resume_command(self.run)}", flush=True)
        if self.trainer.world_size == 1:
            self.datamodule.engine.when_it_hangs(lambda reason: start_again(reason, self.run))

    def fit(self, model: ASPOModule, datamodule: RolloutDataModule, ckpt_path: str | None = None) -> None:
        """Called as ``trainer.fit`` by LightningCLI."""
        try:
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        except EngineError as error:
            if self.trainer.world_size > 1:
                raise
            start_again(str(error), self.run)

    def after_fit(self) -> None:
        self.datamodule.close()
        if self.trainer.is_global_zero and self.run is not None:
            print(fit_summary(self.trainer, self.run), flush=True)
        wait_for_ranks(self.trainer)
        if self.trainer.is_global_zero:
            stop = callback_of(self.trainer, GracefulStop)
            if stop is not None and stop.received is not None:
                sys.exit(128 + stop.received)  # as if it had not been caught: the run isn't finished

    def after_validate(self) -> None:
        self.datamodule.close()
        wait_for_ranks(self.trainer)


RESTARTED = "ASPO_RESTARTED"  # in the environment of a run that was started again, why


def start_again(reason: str, run: RunFolder | None) -> NoReturn:
    """Replaces this process by one that resumes the run, whatever state it is in; once.

    That is as good as a new engine with the current weights: the last checkpoint is from the beginning of the phase,
    and the same completions are drawn.
    """
    if before := os.environ.get(RESTARTED):
        resume = f" Resume with --ckpt_path {run.path}." if run and run.has_checkpoints() else ""
        print(f"aspo: error: {reason}; and before: {before}.{resume}", file=sys.stderr, flush=True)
        os._exit(1)
    arguments = sys.argv[1:]
    if run and run.has_checkpoints():
        arguments = [*arguments_without_checkpoint(), "--ckpt_path", str(run.path)]
    print(f"{reason}. Starting again.", file=sys.stderr, flush=True)
    program = f"import sys; sys.argv[0] = {sys.argv[0]!r}; from aspo_lightning.cli.main import main; main()"
    os.execve(sys.executable, [sys.executable, "-c", program, *arguments], {**os.environ, RESTARTED: reason})


def arguments_without_checkpoint() -> list[str]:
    """Those of this command."""
    arguments = sys.argv[1:]
    while "--ckpt_path" in arguments:
        at = arguments.index("--ckpt_path")
        del arguments[at : at + 2]
    return [a for a in arguments if not a.startswith("--ckpt_path=")]


def resume_command(run: RunFolder) -> str:
    """What to type to resume a run that this command has started. As it was called: `aspo` need not be on the PATH."""
    return shlex.join([sys.argv[0], *arguments_without_checkpoint(), "--ckpt_path", str(run.path)])


def fit_summary(trainer: Trainer, run: RunFolder) -> str:
    """What came of a fit, where it is, and what to type next."""
    report = callback_of(trainer, EvaluationReport)
    assert report is not None
    lines = [
        f"{name}: {report.before[name]:.3f} before, {report.after[name]:.3f} after"
        for name in report.before
        if name in report.after
    ]
    lines += [f"peak memory    {peak_memory() / 1e9:.1f} GB", f"run            {run.path}"]
    resume = resume_command(run)
    for saved in trainer.checkpoint_callbacks:
        if isinstance(saved, ModelCheckpoint) and saved.best_model_path:
            monitored = isinstance(saved, BestCheckpoint)
            path = run.path / Path(saved.best_model_path).parent.name / Path(saved.best_model_path).name
            lines.append(f"{'best' if monitored else 'checkpoint':<15}{path}")
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        tensorboard = shlex.quote(str(Path(sys.argv[0]).with_name("tensorboard")))
        lines.append(f"to look        {tensorboard} --logdir {shlex.quote(str(run.path))}")
    lines.append(f"to read        {shlex.join([sys.argv[0], 'view', str(run.path)])}")
    if run.has_checkpoints():
        lines.append(f"to resume      {resume}")
        if (epochs := trainer.max_epochs or 0) > 0:
            lines.append(f"to train on    {resume} --trainer.max_epochs {2 * epochs}")
    return "\n".join(["", *lines])


def place_loggers(loggers: object, run: RunFolder, steps: int | None) -> None:
    """Puts the run's folder into the settings of its loggers; ``steps`` is that of the checkpoint it is resumed from.

    Those of Lightning that make a folder of their own for each run write into this one. TensorBoard then shows what was
    logged after the checkpoint once. A CSV file can't be continued: a resumed run writes one next to it.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if not isinstance(logger, Namespace) or "init_args" not in logger:
            continue
        settings = logger.init_args
        in_run = settings.get("save_dir") == RUN
        for key, value in settings.items():
            if isinstance(value, str):
                settings[key] = value.replace(RUN, str(run.path))
        kind = logger.class_path.rpartition(".")[2]
        if in_run and kind in ("TensorBoardLogger", "CSVLogger"):
            settings.name = settings.version = ""
            if kind == "CSVLogger":
                settings.version = "csv" + run.suffix(run.starts())
            elif steps is not None:
                settings.purge_step = steps


def check_same_computation(run: RunFolder, config: Mapping[str, object]) -> None:
    """Raises ConfigError if a run would be resumed under settings that compute something other than it did so far."""
    before = run.config()
    if before is not None and (changes := differences(computation(before), computation(config))):
        told = "; ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in changes.items())
        raise ConfigError(
            f"The run {run.path} would be resumed with other settings: {told}. Set that back, or resume it anyway "
            "with --allow_changes true."
        )


def computation(config: Mapping[str, object]) -> dict[str, object]:
    """The settings of ``aspo fit`` that determine what a run computes."""
    trainer = config.get("trainer")
    return {
        "seed_everything": config.get("seed_everything"),
        "model": counting(config.get("model") or {}, ASPOModule, ModelSettings),
        "data": counting(config.get("data") or {}, RolloutDataModule, RolloutSettings),
        "trainer": {key: trainer.get(key) if isinstance(trainer, Mapping) else None for key in TRAINER},
    }


def check_checkpoints(settings: Namespace) -> None:
    """Raises ConfigError for checkpoints in the middle of an epoch: its phase couldn't be sampled again."""
    for name in ("every_n_train_steps", "train_time_interval", "save_on_exception"):
        if settings.get(name):
            raise ConfigError(
                f"checkpoint.{name} is {settings[name]}, but checkpoints are written at the end of an epoch, when its "
                "phase is used up. Set checkpoint.every_n_epochs instead."
            )
    if settings.get("dirpath"):
        raise ConfigError(
            f"checkpoint.dirpath is {settings.dirpath}, but a run's checkpoints are in its folder. Set "
            "trainer.default_root_dir to have that elsewhere."
        )


def check_strategy(strategy: object) -> None:
    """Raises ConfigError for those whose shards can't be scored, synced and saved here."""
    name = strategy.class_path if isinstance(strategy, Namespace) else str(strategy)
    kind = name.rpartition(".")[2].lower()
    if kind.startswith(("fsdp", "deepspeed", "modelparallel")) and not kind.startswith("fsdp2"):
        raise ConfigError(f"trainer.strategy is {name}: use fsdp2, which shards the model, or ddp, which doesn't.")
