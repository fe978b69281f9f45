"""Makes the runs of a study: several at a time, each resumed where it was cut off, and made once only."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.run.curves import by_epoch, read_run
from aspo_lightning.run.disk import file_digest, write_text
from aspo_lightning.run.folder import RunFolder, last_run
from aspo_lightning.run.provenance import processor
from aspo_lightning.shipped import find_config
from aspo_lightning.study.study import Cell, Study
from aspo_lightning.study.table import RunCurves, read_table, results, times, to_csv

Origin = dict[str, object]
"""Versions, processor and digests of weights."""

ASPO = [sys.executable, "-P", "-m", "aspo_lightning.cli.start"]  # -P: as the script, which a random.py here can't break


class CellFolder:
    """What a study keeps of a cell: its run, ``log.txt`` and ``asked.json``.

    Once it is finished, ``config.yaml``, ``origin.json``, ``seconds.csv`` and ``curves.csv`` as well, and its run isn't
    needed any more.
    """

    def __init__(self, study: Study, folder: Path, cell: Cell) -> None:
        self.cell = cell
        self.path = folder / cell.arm / f"seed_{cell.seed}"
        self.log = self.path / "log.txt"
        self._curves = self.path / "curves.csv"
        self._asked = self.path / "asked.json"
        self._origin = self.path / "origin.json"
        self._config = self.path / "config.yaml"
        self._seconds = self.path / "seconds.csv"
        self.arguments = [*study.arguments, *study.arms[cell.arm], "--seed_everything", str(cell.seed)]
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(study.threads)}
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    @property
    def finished(self) -> bool:
        return self._curves.exists()

    @property
    def curves(self) -> RunCurves:
        """Those of the finished run."""
        return read_table(self._curves)[self.cell.arm][self.cell.seed]

    @property
    def seconds(self) -> RunCurves:
        """Those of its phases."""
        return read_table(self._seconds)[self.cell.arm][self.cell.seed]

    @property
    def config(self) -> str:
        """All settings of the finished run, as YAML."""
        return self._config.read_text()

    @property
    def origin(self) -> Origin:
        """Where the numbers of the finished run come from."""
        found: Origin = json.loads(self._origin.read_text())
        return found

    @property
    def run(self) -> RunFolder:
        """Its newest run that has a checkpoint.

        Raises:
            ConfigError: if there is none yet.
        """
        return last_run(self.path)

    def claim(self) -> None:
        """Notes what the cell is asked.

        Raises:
            ConfigError: if it was begun with other settings, or has a config that isn't YAML.
        """
        asked = json.dumps(self._settings(), indent=1, default=str) + "\n"
        if not self._asked.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self._asked, asked)
        elif self._asked.read_text() != asked:
            raise ConfigError(
                f"{self.path} was begun with other settings than the study has now ({self._asked.name} has them). Give "
                "the study another folder with --folder, or put its settings back."
            )

    def _settings(self) -> dict[str, object]:
        """What decides the cell's numbers: its arguments, and what is in the configs that they name."""
        given = [part for a in self.arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
        pairs = pairwise(given)
        configs = [find_config(value) for key, value in pairs if key in ("-c", "--config")]  # files, or YAML itself
        # PTH113: false for a name that is too long
        texts = [Path(c).read_text() if os.path.isfile(c) else c for c in configs]  # noqa: PTH113
        try:
            said = [yaml.safe_load(text) for text in texts]
        except yaml.YAMLError as error:
            raise ConfigError(
                f"A config that {self.cell.arm} names isn't YAML: {' '.join(str(error).split())}"
            ) from error
        return {"arguments": self.arguments, "threads": self.environment["OMP_NUM_THREADS"], "configs": said}

    def fit(self) -> None:
        """Trains to the end, and writes the curves.

        Raises:
            RunError: if the run fails, or leaves no curves.
        """
        command = [*ASPO, "fit", *self.arguments, "--trainer.default_root_dir", str(self.path)]
        with contextlib.suppress(ConfigError):  # there is none: from the start
            command += ["--ckpt_path", str(self.run.path)]
        with self.log.open("ab") as log:
            # In a session of its own, or Ctrl-C would reach it a second time, which ends it without a checkpoint.
            self._process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = self._process.wait()
        if status:
            raise RunError(f"{self.cell.arm}, seed {self.cell.seed}: `aspo fit` failed ({status}); see {self.log}.")
        try:
            logged = by_epoch(read_run(self.run.path))
        except ConfigError as error:
            raise RunError(f"{self.cell.arm}, seed {self.cell.seed} can't be read: {error}") from error
        if not (curves := results(logged)):
            raise RunError(f"{self.cell.arm}, seed {self.cell.seed} has logged no curves; see {self.log}.")
        config = self.run.config() or {}
        write_text(self._config, yaml.safe_dump(config, sort_keys=False))
        write_text(self._origin, json.dumps(origin(self.run, config), indent=1) + "\n")
        write_text(self._seconds, self._csv(times(logged)))
        write_text(self._curves, self._csv(curves))  # the last: now it is finished

    def _csv(self, curves: RunCurves) -> str:
        return to_csv({self.cell.arm: {self.cell.seed: curves}})

    def end(self) -> None:
        """Asks the run to end after its epoch, once; it can be resumed."""
        if self._process is not None and not self._ended:
            self._ended = True
            self._process.terminate()


def origin(run: RunFolder, config: Mapping[str, object]) -> Origin:
    """Versions, processor, and digests of the files that the run's model was loaded from, if they are here."""
    begun = run.origin()
    model = config.get("model")
    name = model.get("model_name_or_path", "") if isinstance(model, Mapping) else ""
    files = sorted(Path(name).expanduser().glob("*.safetensors"))
    return {
        "versions": begun.get("versions"),
        "aspo_lightning": begun.get("aspo_lightning"),
        "processor": processor(),
        "weights": {file.name: file_digest(file) for file in files},
    }


def fit_all(cells: Sequence[CellFolder], jobs: int) -> None:
    """Trains what isn't finished, so many at a time. Cells that fail don't keep others from being made.

    Raises:
        RunError: if some failed.
    """
    failed: list[RunError | OSError] = []
    missing = [cell for cell in cells if not cell.finished]
    pool = ThreadPoolExecutor(jobs)
    runs = [pool.submit(cell.fit) for cell in missing]
    try:
        for run in progress(runs, len(cells) - len(missing), len(cells)):
            error = run.exception()
            if isinstance(error, (RunError, OSError)):
                failed.append(error)
                tqdm.write(str(error), file=sys.stderr)
            elif error is not None:
                raise error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(run.done() for run in runs):  # one may be about to start its process
            for cell in missing:
                cell.end()
            time.sleep(0.1)
    if failed:
        raise RunError(f"{len(failed)} of {len(cells)} runs failed: {failed[0]} The same command resumes the study.")


def progress(runs: Sequence[Future[None]], done: int, all: int) -> Iterable[Future[None]]:
    """The runs as they finish, with a bar that says how long the others will take."""
    with tqdm(total=all, initial=done, desc="Runs", unit="run", smoothing=0) as bar:
        for run in as_completed(runs):
            yield run
            bar.update()
