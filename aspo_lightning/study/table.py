"""The table of a study: a row for each epoch of each run, a column for each curve; in plain CSV."""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.run.tags import CLOCKED

KEYS = ("arm", "seed", "epoch")

LEFT_OUT = (*CLOCKED, "final/", "hp_metric", "epoch")
"""Beginnings of the tags that aren't results."""

RunCurves = Mapping[str, Mapping[int, float]]
"""Values of a run by tag and epoch."""

Table = dict[str, dict[int, RunCurves]]
"""Those of a study by arm and seed."""


def results(curves: RunCurves) -> RunCurves:
    """The curves of a run that depend on nothing but its settings and its seed."""
    return {tag: dict(values) for tag, values in sorted(curves.items()) if not tag.startswith(LEFT_OUT)}


def times(curves: RunCurves) -> RunCurves:
    """The seconds of a run's phases, which are in no two runs the same."""
    return {tag: dict(values) for tag, values in sorted(curves.items()) if tag.startswith("time/")}


def to_csv(table: Mapping[str, Mapping[int, RunCurves]]) -> str:
    """The table as text. Values have all the digits that float32 has, so nothing is lost."""
    tags = sorted({tag for seeds in table.values() for curves in seeds.values() for tag in curves})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*KEYS, *tags])
    for arm, seeds in table.items():
        for seed, curves in seeds.items():
            for epoch in sorted({epoch for values in curves.values() for epoch in values}):
                values = [curves.get(tag, {}).get(epoch) for tag in tags]
                writer.writerow([arm, seed, epoch, *("" if v is None else str(np.float32(v)) for v in values)])
    return out.getvalue()


def read_table(path: Path) -> Table:
    """Reads what ``to_csv`` wrote.

    Raises:
        ConfigError: if the file isn't there.
        RunError: if it is damaged.
    """
    try:
        rows = list(csv.reader(io.StringIO(path.read_text())))
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}). Give the folder of a study's table.") from error
    except ValueError as error:
        raise RunError(f"{path} isn't a study's table: {error}.") from error
    if not rows or tuple(rows[0][:3]) != KEYS:
        raise RunError(f"{path} isn't a study's table: its first line doesn't begin with {','.join(KEYS)}.")
    tags = rows[0][3:]
    table: dict[str, dict[int, dict[str, dict[int, float]]]] = {}
    for number, row in enumerate(rows[1:], 2):
        try:
            arm, seed, epoch = row[0], int(row[1]), int(row[2])
            curves = table.setdefault(arm, {}).setdefault(seed, {})
            for tag, value in zip(tags, row[3:], strict=True):
                if value:
                    curves.setdefault(tag, {})[epoch] = float(np.float32(value))
        except (ValueError, IndexError) as error:
            raise RunError(f"{path} is damaged in line {number}: {error}.") from error
    return {arm: dict(seeds) for arm, seeds in table.items()}


def last(curves: RunCurves, tag: str, epochs: int = 1) -> float:
    """The mean of the last values of a curve; NaN if it has none in the run's last epoch."""
    found = sorted(curves.get(tag, {}).items())
    if not found or found[-1][0] != epochs_of(curves) - 1:
        return math.nan
    values = [value for _, value in found][-epochs:]
    return sum(values) / len(values)


def epochs_of(curves: RunCurves) -> int:
    """How many epochs a run has."""
    return 1 + max((epoch for values in curves.values() for epoch in values), default=-1)


def series(runs: Iterable[RunCurves], tag: str) -> dict[int, list[float]]:
    """Values of a curve by epoch, one for each run that has it there."""
    found: dict[int, list[float]] = {}
    for curves in runs:
        for epoch, value in curves.get(tag, {}).items():
            found.setdefault(epoch, []).append(value)
    return dict(sorted(found.items()))
