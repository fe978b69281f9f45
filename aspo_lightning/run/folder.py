"""Where a run lives, whatever logs it: ``trainer.default_root_dir/version_N``, and what is where in that folder."""

import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import TextIO

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from aspo_lightning.errors import AspoError, ConfigError, RunError
from aspo_lightning.run.checkpoints import METADATA, check_whole, metadata, trained_steps
from aspo_lightning.run.disk import lock, write_text
from aspo_lightning.run.lightning import callback_of
from aspo_lightning.run.provenance import git_revision, versions


class RunFolder:
    """The folder of a run: ``checkpoints/``, ``best/``, ``eval/``, ``config.yaml`` and ``origin.json``.

    The last two are written again on each resume, as ``config_resumed_1.yaml`` and so on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"

    def evaluation(self, step: int, again: int = 0) -> Path:
        """Where an evaluation in training is; ``again`` counts different ones of the same step."""
        return self.path / "eval" / (f"step_{step:06d}" + (f".{again}" if again else ""))

    def evaluations(self) -> list[tuple[int, Path]]:
        """(step, folder) of the evaluations in training, in order; of those of the same step, too."""
        names = ((re.fullmatch(r"step_(\d+)(?:\.(\d+))?", path.name), path) for path in self.path.glob("eval/step_*"))
        found = sorted((int(match[1]), int(match[2] or 0), path) for match, path in names if match)
        return [(step, path) for step, _, path in found]

    def not_finite(self, step: int, rank: int) -> Path:
        """Where the micro-batches are whose loss or gradient wasn't finite."""
        return self.path / f"not_finite_step_{step}_rank_{rank}.pt"

    def starts(self) -> int:
        """How often the run has been started so far."""
        return next(n for n in itertools.count() if not (self._config(n).exists() or self._origin(n).exists()))

    def _config(self, number: int) -> Path:
        return self.path / f"config{self.suffix(number)}.yaml"

    def _origin(self, number: int) -> Path:
        return self.path / f"origin{self.suffix(number)}.json"

    @staticmethod
    def suffix(number: int) -> str:
        """Suffix of the files a run writes on its n-th resume."""
        return f"_resumed_{number}" if number else ""

    def config(self) -> dict[str, object] | None:
        """The settings that the run had last; None if it has none.

        Raises:
            RunError: if they are damaged.
        """
        path = self._config(self.starts() - 1)
        if not path.exists():
            return None
        try:
            return dict(yaml.safe_load(path.read_text()))
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise RunError(
                f"{path} is damaged: {' '.join(str(error).split())}. Without it a run is resumed with "
                "--allow_changes true."
            ) from error

    def origin(self) -> dict[str, object]:
        """Where the numbers come from, as ``record`` wrote it last; empty if that isn't there or is damaged."""
        try:
            return dict(json.loads(self._origin(self.starts() - 1).read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def record(self, config: str | None, ranks: int) -> None:
        """Writes the settings, where there are some, and where the numbers come from."""
        number = self.starts()
        if config is not None:
            write_text(self._config(number), config)
        origin = {
            "command": sys.argv,
            "versions": versions(),
            "aspo_lightning": git_revision(Path(__file__).parent),
            "working_directory": git_revision(Path.cwd()),
            "ranks": ranks,
        }
        write_text(self._origin(number), json.dumps(origin, indent=1) + "\n")

    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("*.ckpt"))

    def newest_checkpoint(self) -> Path:
        """The checkpoint after the most optimizer steps that isn't damaged. Damaged ones are named.

        Raises:
            ConfigError: if it has none.
            RunError: if all are damaged.
        """
        paths = [path for path in self.checkpoints.glob("*.ckpt") if not path.is_symlink()]
        if not paths:
            raise ConfigError(f"The run {self.path} has no checkpoint yet.")
        for path in sorted(paths, key=_steps, reverse=True):
            try:
                check_whole(path)
                metadata(path)
            except AspoError as error:
                print(f"{str(error).partition('. Resume')[0].removesuffix('.')}. Taking the one before it.")
            else:
                return path
        raise RunError(f"All checkpoints of {self.path} are damaged: {', '.join(path.name for path in paths)}.")


def _steps(checkpoint: Path) -> float:
    """As the checkpoint itself says: clocks jump, and names can be anything. What can't be read is looked at first."""
    try:
        return trained_steps(checkpoint)
    except AspoError:
        return math.inf


def new_run(root: Path) -> RunFolder:
    """The next free folder below ``root``, not made yet."""
    return RunFolder(root / f"version_{1 + max(_runs(root), default=-1)}")


def last_run(root: Path) -> RunFolder:
    """The newest run below ``root`` that has a checkpoint.

    Raises:
        ConfigError: if there is none.
    """
    for _, path in sorted(_runs(root).items(), reverse=True):
        if (run := RunFolder(path)).has_checkpoints():
            return run
    raise ConfigError(
        f"--ckpt_path last: no run below {root} has a checkpoint yet. Start one without --ckpt_path, or give the "
        "folder of a run, or a checkpoint."
    )


def _runs(root: Path) -> dict[int, Path]:
    """The runs below ``root`` by their number. Folders with other names, such as copies, are none of them."""
    names = ((re.fullmatch(r"version_(\d+)", path.name), path) for path in root.glob("version_*"))
    return {int(match[1]): path for match, path in names if match}


def is_run(source: Path) -> bool:
    """Whether a path is a run's folder. It may have no checkpoint yet."""
    return source.is_dir() and (RunFolder(source).checkpoints.is_dir() or RunFolder(source).starts() > 0)


def is_trained(source: Path) -> bool:
    """Whether a path is a run's folder or a checkpoint."""
    return is_run(source) or source.is_file() or (source / METADATA).is_file()


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that a user means by a run's folder or a path.

    Raises:
        ConfigError: if there is none.
    """
    if is_run(source):
        return RunFolder(source).newest_checkpoint()
    if is_trained(source):
        check_whole(source)
        return source.resolve()
    raise ConfigError(
        f"{source} is neither a run's folder (like runs/quickstart/version_0) nor a checkpoint (like "
        "runs/quickstart/version_0/checkpoints/epoch_00029.ckpt)."
    )


class RunRecord(Callback):
    """Locks the run's folder while it is trained, and records its settings there.

    Args:
        folder: of the run.
        config: its settings, as YAML. None: those of a program.
    """

    def __init__(self, folder: RunFolder, config: str | None = None) -> None:
        self.folder, self.config = folder, config
        self._lock: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.folder = RunFolder(trainer.strategy.broadcast(self.folder.path))
        if trainer.is_global_zero:
            self._lock = lock(self.folder.path)
            self.folder.record(self.config, trainer.world_size)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._lock is not None:
            self._lock.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which doesn't come


def run_folder(trainer: Trainer) -> RunFolder | None:
    """The folder of a Trainer's run, where one is kept."""
    record = callback_of(trainer, RunRecord)
    return record.folder if record else None
