"""What a study leaves to keep: its question, its table and where its numbers come from, in small files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from aspo_lightning.errors import ConfigError
from aspo_lightning.run.disk import write_text
from aspo_lightning.study.cells import CellFolder, Origin
from aspo_lightning.study.report import figure, markdown
from aspo_lightning.study.study import Study, read_study
from aspo_lightning.study.table import RunCurves, Table, read_table, to_csv


class Shared(TypedDict):
    """Runs, by arm and seed, whose numbers come from the same versions, processor and weights."""

    runs: dict[str, list[int]]
    origin: Origin


class StudyResults:
    """A folder of small files.

    ``study.yaml``, ``curves.csv``, ``seconds.csv``, ``report.md``, ``figure.png``, ``origin.json`` and ``configs/``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._study = path / "study.yaml"
        self._curves = path / "curves.csv"
        self._seconds = path / "seconds.csv"

    @property
    def exists(self) -> bool:
        return self._study.is_file() and self._curves.is_file()

    def study(self) -> Study:
        return read_study(self._study)

    def table(self) -> Table:
        return read_table(self._curves)

    def report(self) -> str:
        """All that the tables say, in Markdown."""
        seconds = read_table(self._seconds) if self._seconds.is_file() else {}
        return markdown(self.study(), self.table(), seconds)

    def check(self, study: Study) -> None:
        """Raises ConfigError if the folder has results of runs that the study doesn't have."""
        if self.exists and (lost := [cell for cell in self.study().cells if cell not in study.cells]):
            raise ConfigError(
                f"{self.path} has {lost[0].arm}, seed {lost[0].seed}, which this study doesn't: it would be lost. Give "
                "the study another folder with --folder."
            )

    def write(self, text: str, study: Study, cells: Sequence[CellFolder]) -> None:
        """Writes it all from finished cells; ``text`` is that of the study's file, as it was before the runs."""
        (self.path / "configs").mkdir(parents=True, exist_ok=True)
        write_text(self._study, text)
        table: Table = {}
        seconds: Table = {}
        for cell in cells:
            table.setdefault(cell.cell.arm, {})[cell.cell.seed] = cell.curves
            seconds.setdefault(cell.cell.arm, {})[cell.cell.seed] = cell.seconds
        write_text(self._curves, to_csv(table))
        write_text(self._seconds, to_csv(seconds))
        for cell in cells:
            if cell.cell.seed == study.seeds[0]:
                write_text(self.path / "configs" / f"{cell.cell.arm}.yaml", cell.config)
        write_text(self.path / "origin.json", json.dumps(origins(cells), indent=1) + "\n")
        write_text(self.path / "report.md", self.report() + "\n")
        figure(study, table, self.path / "figure.png")

    def arm(self, name: str | None) -> tuple[str, Sequence[RunCurves]]:
        """An arm and its runs. None: the only one.

        Raises:
            ConfigError: if it isn't there, or several are.
        """
        table = self.table()
        if name is None and len(table) > 1:
            raise ConfigError(f"{self.path} has the arms {', '.join(table)}. Choose one with --arm.")
        arm = next(iter(table)) if name is None else name
        if arm not in table:
            raise ConfigError(f"{self.path} has no arm {arm!r}. It has {', '.join(table)}.")
        return arm, list(table[arm].values())


def origins(cells: Sequence[CellFolder]) -> list[Shared]:
    """Those of the cells, each once."""
    found: list[Shared] = []
    for cell in cells:
        origin = cell.origin
        same = next((one for one in found if one["origin"] == origin), None)
        if same is None:
            same = {"runs": {}, "origin": origin}
            found.append(same)
        same["runs"].setdefault(cell.cell.arm, []).append(cell.cell.seed)
    return found
