"""``aspo test``: evaluates a model, and keeps what comes of it in a folder."""

import warnings
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from aspo_lightning.cli.fit import ASPOCLI
from aspo_lightning.cli.ranks import wait_for_ranks
from aspo_lightning.errors import ConfigError
from aspo_lightning.evaluation.callbacks import EvaluationResults
from aspo_lightning.run.checkpoints import trained_from
from aspo_lightning.run.disk import check_writable
from aspo_lightning.run.folder import is_trained
from aspo_lightning.run.lightning import callback_of


class EvaluationCLI(ASPOCLI):
    """``aspo test``: evaluates a model, and keeps what comes of it in a folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--out", type=Path | None, default=None, help="folder of the results; results/MODEL if unset"
        )
        parser.add_argument("--only", type=list[str], default=[], help="of the tasks in data.val: [aime24, amc23]")

    def before_instantiate_classes(self) -> None:
        config = self.config.test
        source = Path(config.ckpt_path or config.model.model_name_or_path).expanduser()
        config.ckpt_path = config.ckpt_path or (str(source) if is_trained(source) else None)
        super().before_instantiate_classes()
        warnings.filterwarnings("ignore", message="The dirpath has changed")  # nothing is saved here
        if config.only:
            choose(config.data, config.only)
        name = source.name
        if config.ckpt_path:
            checkpoint = Path(config.ckpt_path)
            for key, value in trained_from(checkpoint).items():
                config.model[key] = value
            config.data.model_name_or_path = config.model.model_name_or_path
            run = checkpoint.parent.parent
            name = f"{run.parent.name}_{run.name}_{checkpoint.stem}"
        config.out = config.out or Path("results") / name
        check_writable(config.out.parent, "--out")
        config.verbose = False

    def before_test(self) -> None:
        results = callback_of(self.trainer, EvaluationResults)
        assert results is not None
        results.folder = self.config.test.out

    def after_test(self) -> None:
        self.datamodule.close()
        wait_for_ranks(self.trainer)


def choose(data: Namespace, names: list[str]) -> None:
    """Leaves only the named tasks to evaluate. Raises ConfigError if there is no such task."""
    if unknown := [name for name in names if name not in (data.val or {})]:
        raise ConfigError(f"--only names {unknown[0]}, but the tasks of data.val are {', '.join(data.val or {})}.")
    data.val = {name: data.val[name] for name in names}
    if isinstance(data.eval_group_size, dict):
        data.eval_group_size = {name: size for name, size in data.eval_group_size.items() if name in names}
