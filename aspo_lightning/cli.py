"""The command line: ``aspo fit | validate | test | plan | export | report``."""

import fcntl
import inspect
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn, TextIO

# Before torch and tokenizers are imported: the reward processes are forked off a process with threads otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from aspo_lightning import export, report
from aspo_lightning.callbacks import (
    BestCheckpoint,
    EvaluationReport,
    EvaluationResults,
    PhaseReport,
    peak_memory_gb,
    run_folder,
)
from aspo_lightning.checkpoints import AtomicCheckpointIO, check_whole, last_checkpoint, write_text
from aspo_lightning.datamodule import RolloutDataModule
from aspo_lightning.engines import Generator
from aspo_lightning.engines.watchdog import Watchdog
from aspo_lightning.errors import ConfigError, EngineError
from aspo_lightning.export import find_checkpoint, is_trained, trained_from, trained_steps
from aspo_lightning.guards import CollapseGuard, GracefulStop, NonFiniteGuard, RatioCanary
from aspo_lightning.module import ASPOModule
from aspo_lightning.objectives import Objective
from aspo_lightning.plan import Planner
from aspo_lightning.provenance import changed_mathematics, git_revision, versions
from aspo_lightning.tasks import Task


class Parser(LightningArgumentParser):
    """Reports a bad setting in one line."""

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Checks null like any other value, which jsonargparse leaves out; each class' settings have such a parser."""
        super().validate(namespace, *args, **kwargs)  # first what is missing, which is null here as well
        super().validate(namespace, *args, **{**kwargs, "skip_unset": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        # A class' settings have a parser of their own, whose message is in that of the parser above it.
        if match := re.search(r'Parser key "([^"]+)".*?(?:([\w.]+) is null\.|value: None\b)', message):
            key = ".".join(filter(None, match.groups()))
            message = f"{key} is null. Give it a value, or leave it out for the default."
        elif match := re.search(
            r'"(?:\w+\.)*(model\.objective|data\.(?:engine|train|val))".*import path string: (\S+)', message
        ):
            key, name = match.groups()
            known = ", ".join(sorted(subclass_names(SWAPPABLE[key])))
            message = (
                f"{key} is {name!r}, which is no class of its kind. Known are {known}; any other by its import path."
            )
        raise ConfigError(message)


SWAPPABLE: dict[str, type] = {
    "model.objective": Objective,
    "data.engine": Generator,
    "data.train": Task,
    "data.val": Task,
}


def subclass_names(base: type) -> set[str]:
    """Names of all concrete classes below ``base``."""
    children: list[type] = base.__subclasses__()
    below = {name for child in children for name in subclass_names(child)}
    return below | {child.__name__ for child in children if not inspect.isabstract(child)}


GUARDS = {"non_finite": NonFiniteGuard, "ratio_canary": RatioCanary, "collapse": CollapseGuard}


class SaveConfig(SaveConfigCallback):
    """Writes resolved config, versions and code revision into the run's folder; new files each time it goes on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self.lock: TextIO | None = None

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or (log_dir := run_folder(trainer)) is None:
            return
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(folder)
        again = next(n for n in itertools.count() if not (folder / f"config{resumed(n)}.yaml").exists())
        write_text(folder / f"config{resumed(again)}.yaml", self.parser.dump(self.config, skip_none=False))
        origin = {
            "command": sys.argv,
            "versions": versions(),
            "aspo_lightning": git_revision(Path(__file__).parent),
            "working_directory": git_revision(Path.cwd()),
            "ranks": trainer.world_size,
        }
        write_text(folder / f"origin{resumed(again)}.json", json.dumps(origin, indent=1) + "\n")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.lock is not None:
            self.lock.close()


def lock(folder: Path) -> TextIO:
    """Keeps other runs out of a run's folder, for as long as the file is open. Raises ConfigError if one is in it."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(f"Another run is writing to {folder}. Wait for its end, or start this one again.") from error
    return file


def resumed(number: int) -> str:
    """What the files have in their names that a run writes when it goes on for the n-th time."""
    return f"_resumed_{number}" if number else ""


class ASPOCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.model_name_or_path", "data.model_name_or_path")
        parser.link_arguments("data.temperature", "model.temperature")
        parser.link_arguments("seed_everything", "data.seed")
        for key, guard in GUARDS.items():
            parser.add_lightning_class_args(guard, key)
        parser.add_lightning_class_args(BestCheckpoint, "best")  # first: the other's checkpoints hold its state
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "trainer.reload_dataloaders_every_n_epochs": 1,
                "trainer.use_distributed_sampler": False,
                "trainer.num_sanity_val_steps": 0,
                "trainer.log_every_n_steps": 1,
                "trainer.gradient_clip_val": 1.0,
                "trainer.max_epochs": 100,
                "trainer.logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "runs", "name": "aspo"},
                },
                "checkpoint.monitor": "step",  # the newest two: one may turn out to be damaged
                "checkpoint.mode": "max",
                "checkpoint.save_top_k": 2,
                "checkpoint.filename": "epoch_{epoch:05d}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": "link",
                "checkpoint.save_on_train_epoch_end": True,
                "checkpoint.enable_version_counter": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """LightningCLI would read the whole checkpoint here, for hyperparameters that there are none of."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--allow_changes", type=bool, default=False, help="resume under a config that computes something else"
            )
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        subcommands = LightningCLI.subcommands()
        return {name: subcommands[name] for name in ("fit", "validate", "test")}

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self.subcommand == "fit":
            check_checkpoints(config.checkpoint)
        check_strategy(config.trainer.strategy)
        logger = config.trainer.logger
        if not isinstance(logger, Namespace) or "save_dir" not in logger.init_args:
            return
        root = Path(logger.init_args.save_dir) / (logger.init_args.get("name") or "")
        check_writable(Path(logger.init_args.save_dir))
        if config.get("ckpt_path") == "last":
            checkpoint = last_checkpoint(root)
            config.ckpt_path = str(checkpoint)
            if self.subcommand == "fit":
                logger.init_args.version = checkpoint.parent.parent.name  # goes on in that run's folder
                # What was logged behind the checkpoint is logged again: TensorBoard shows it once.
                logger.dict_kwargs = {**logger.get("dict_kwargs", {}), "purge_step": trained_steps(checkpoint)}
                print(f"Resuming from {checkpoint}")
        elif config.get("ckpt_path"):
            check_whole(Path(config.ckpt_path))
        if self.subcommand == "fit" and config.ckpt_path and not config.allow_changes:
            now = yaml.safe_load(self._parser("fit").dump(config, skip_none=False))
            check_same_mathematics(Path(config.ckpt_path), now)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return super().instantiate_trainer(plugins=[AtomicCheckpointIO()], **kwargs)

    def before_fit(self) -> None:
        if self.trainer.world_size == 1:
            Watchdog.on_hang = staticmethod(lambda reason: start_again(reason, run_folder(self.trainer)))

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Called as ``trainer.fit`` by LightningCLI."""
        try:
            self.trainer.fit(model, **kwargs)
        except EngineError as error:
            if self.trainer.world_size > 1:
                raise
            start_again(str(error), run_folder(self.trainer))

    def after_fit(self) -> None:
        self.datamodule.close()
        if self.trainer.is_global_zero:
            print(fit_summary(self.trainer))
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            if (received := next(c for c in callbacks if isinstance(c, GracefulStop)).received) is not None:
                sys.exit(128 + received)  # as if it had not been caught: the run isn't at its end


class EvaluationCLI(ASPOCLI):
    """``aspo test``: evaluates a model, and keeps what comes of it in a folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--out", type=Path | None, default=None, help="folder of the results; results/MODEL if unset"
        )
        parser.add_argument("--only", type=list[str], default=[], help="of the tasks in data.val: [aime24, amc23]")

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        warnings.filterwarnings("ignore", message="The dirpath has changed")  # nothing is saved here
        config = self.config.test
        if config.only:
            choose(config.data, config.only)
        source = Path(config.ckpt_path or config.model.model_name_or_path).expanduser()
        name = source.name
        if config.ckpt_path or is_trained(source):
            checkpoint = find_checkpoint(source)
            for key, value in trained_from(checkpoint).items():
                config.model[key] = value
            config.data.model_name_or_path = config.model.model_name_or_path
            config.ckpt_path = str(checkpoint)
            run = checkpoint.parent.parent
            name = f"{run.parent.name}_{run.name}_{checkpoint.stem}"
        config.out = config.out or Path("results") / name
        check_writable(config.out.parent)
        config.trainer.logger = False  # the folder holds it all
        config.verbose = False

    def before_test(self) -> None:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        next(c for c in callbacks if isinstance(c, EvaluationResults)).folder = self.config.test.out

    def after_test(self) -> None:
        self.datamodule.close()


class PlanCLI(ASPOCLI):
    """``aspo plan``: takes what ``aspo fit`` takes, and shows what that would need."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpu-memory", type=float | None, default=None, help="GB (decimal) of a GPU; 80 if unset")

    def before_instantiate_classes(self) -> None:
        check_checkpoints(self.config.fit.checkpoint)
        check_strategy(self.config.fit.trainer.strategy)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return Planner(self.config_init.fit.trainer, self.config_init.fit.gpu_memory)

    def before_fit(self) -> None:
        pass

    def after_fit(self) -> None:
        pass


def choose(data: Namespace, names: list[str]) -> None:
    """Leaves only the named tasks to evaluate. Raises ConfigError if there is no such task."""
    if unknown := [name for name in names if name not in (data.val or {})]:
        raise ConfigError(f"--only names {unknown[0]}, but the tasks of data.val are {', '.join(data.val or {})}.")
    data.val = {name: data.val[name] for name in names}
    if isinstance(data.eval_group_size, dict):
        data.eval_group_size = {name: size for name, size in data.eval_group_size.items() if name in names}


RESTARTED = "ASPO_RESTARTED"  # in the environment of a run that was started again, why


def start_again(reason: str, run: str | None) -> NoReturn:
    """Replaces this process by one that resumes the run, whatever state it is in; once.

    That is as good as a new engine with the current weights: the last checkpoint is of the phase's beginning, and the
    same completions are drawn.
    """
    if before := os.environ.get(RESTARTED):
        print(f"aspo: error: {reason}; and before: {before}. Go on by --ckpt_path last.", file=sys.stderr, flush=True)
        os._exit(1)
    arguments = arguments_without_checkpoint()
    if run and any((Path(run) / "checkpoints").glob("*.ckpt")):
        arguments += ["--ckpt_path", "last"]
    print(f"{reason}. Starting again.", file=sys.stderr, flush=True)
    program = [sys.executable, "-c", "from aspo_lightning.cli import main; main()", *arguments]
    os.execve(sys.executable, program, {**os.environ, RESTARTED: reason})


def arguments_without_checkpoint() -> list[str]:
    """Those of this command."""
    arguments = sys.argv[1:]
    while "--ckpt_path" in arguments:
        at = arguments.index("--ckpt_path")
        del arguments[at : at + 2]
    return [a for a in arguments if not a.startswith("--ckpt_path=")]


def fit_summary(trainer: Trainer) -> str:
    """What came of a fit, where it is, and what to type next."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    report = next(c for c in callbacks if isinstance(c, EvaluationReport))
    best, checkpoint = (next(c for c in callbacks if type(c) is kind) for kind in (BestCheckpoint, ModelCheckpoint))
    command = f"aspo {shlex.join(arguments_without_checkpoint())}"
    return "\n".join(
        [
            "",
            *(
                f"{name}: {report.before[name]:.3f} before, {report.after[name]:.3f} after"
                for name in report.before
                if name in report.after
            ),
            f"peak memory    {peak_memory_gb():.1f} GB",
            f"TensorBoard    {run_folder(trainer)}",
            f"checkpoint     {checkpoint.best_model_path}",
            *([f"best           {best.best_model_path} ({best.monitor})"] if best.best_model_path else []),
            f"to look        tensorboard --logdir {run_folder(trainer)}",
            f"to resume      {command} --ckpt_path last",
            f"to go on       {command} --ckpt_path last --trainer.max_epochs {2 * (trainer.max_epochs or 1)}",
        ]
    )


def check_same_mathematics(checkpoint: Path, config: dict[str, Any]) -> None:
    """Raises ConfigError if a run would go on under settings that compute something else than it did so far."""
    folder = checkpoint.resolve().parent.parent
    configs = list(itertools.takewhile(Path.exists, (folder / f"config{resumed(n)}.yaml" for n in itertools.count())))
    if not configs:
        return
    try:
        before = dict(yaml.safe_load(configs[-1].read_text()))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{configs[-1]} is damaged: {error}. Without it a run goes on by --allow_changes true."
        ) from error
    if changes := changed_mathematics(before, config):
        told = "; ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in changes.items())
        raise ConfigError(
            f"The run of {checkpoint} would go on as another one: {told}. Set that back, or go on all the same by "
            "--allow_changes true."
        )


def check_checkpoints(settings: Namespace) -> None:
    """Raises ConfigError for checkpoints in the middle of an epoch: its phase couldn't be sampled again."""
    for name in ("every_n_train_steps", "train_time_interval"):
        if settings.get(name):
            raise ConfigError(
                f"checkpoint.{name} is {settings[name]}, but checkpoints are written at the end of an epoch, when its "
                "phase is used up. Set checkpoint.every_n_epochs instead."
            )


def check_strategy(strategy: Any) -> None:
    """Raises ConfigError for those whose shards can't be scored, synced and saved here."""
    name = strategy.class_path if isinstance(strategy, Namespace) else str(strategy)
    kind = name.rpartition(".")[2].lower()
    if kind.startswith(("fsdp", "deepspeed", "modelparallel")) and not kind.startswith("fsdp2"):
        raise ConfigError(f"trainer.strategy is {name}: use fsdp2, which shards the model, or ddp, which doesn't.")


def check_writable(folder: Path) -> None:
    """Raises ConfigError unless files can be made in ``folder``; makes it if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"The output folder {folder} can't be written to ({error.strerror}). Choose another by "
            "--trainer.logger.init_args.save_dir."
        ) from error


# Of libraries, and nothing that a user could act on.
HARMLESS_WARNINGS = [
    r"Total length of `list` across ranks is zero",  # a run without held-out tasks
    r".*torch\.distributed\.reduce_op.* is deprecated",  # vLLM looks at it
    r".*LeafSpec.* is deprecated",  # Lightning uses it
    r"It is recommended to use .self\.log\(.*sync_dist=True",  # it is used; vLLM's process group confuses Lightning
]


MODEL = "--model.model_name_or_path"  # what a user means by --model, which LightningCLI takes for a config file

TOOLS = {"export": export.main, "report": report.main}


def config_error(error: BaseException | None) -> ConfigError | None:
    """The error, or the one below it, that is for people: jsonargparse wraps those of a class that may be left out."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def main() -> None:
    """Entry point of the console script ``aspo``."""
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    sys.path.append(str(Path.cwd()))  # parts that a user wrote, like my_package.MyObjective
    try:
        command = sys.argv[1] if len(sys.argv) > 1 else ""
        if tool := TOOLS.get(command):
            return tool(sys.argv[2:])
        cli = {"plan": PlanCLI, "test": EvaluationCLI}.get(command, ASPOCLI)
        if command == "plan":
            sys.argv[1] = "fit"  # which is what it parses
        sys.argv[1:] = [MODEL if a == "--model" else a.replace("--model=", f"{MODEL}=", 1) for a in sys.argv[1:]]
        cli(
            ASPOModule,
            RolloutDataModule,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"description": "Also: aspo plan (takes what fit takes), aspo export, aspo report."},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "callbacks": [TQDMProgressBar(), PhaseReport(), EvaluationReport(), EvaluationResults(), GracefulStop()]
            },
        )
    except ValueError as error:
        if (cause := config_error(error)) is None:
            raise
        sys.exit(f"aspo: error: {cause}")
