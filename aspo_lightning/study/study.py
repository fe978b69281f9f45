"""What a study asks, as a YAML file says it before the runs are made: arms, seeds, measures, comparisons."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from aspo_lightning.errors import ConfigError

RESULTS = "results"
"""The folder beside those of the arms in which a study keeps what is small."""

GIVEN = ("--seed_everything", "--trainer.default_root_dir")
"""Arguments that each run gets from its study."""


@dataclass(frozen=True)
class Measure:
    """A number of a run: the mean of the last so many values of a curve."""

    tag: str
    epochs: int = 1

    def __str__(self) -> str:
        return self.tag if self.epochs == 1 else f"{self.tag}, last {self.epochs}"


class Cell(NamedTuple):
    """A run of a study."""

    arm: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study."""

    question: str
    """What it is to answer, and how its settings were chosen."""
    arguments: list[str]
    """Those of ``aspo fit`` that all runs have."""
    arms: dict[str, list[str]]
    """What is compared: by name, the arguments that each adds."""
    seeds: list[int]
    curves: list[str]
    """Tags that are drawn by epoch."""
    primary: Measure
    """What is tested; nothing else is."""
    comparisons: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of arms that are tested by permutation of their runs, with Holm's adjustment for their number."""
    secondary: list[Measure] = field(default_factory=list)
    """What is shown beside it, without a test."""
    threads: int = 1
    """Of the processor, for each run. Other numbers may give other last bits."""

    def __post_init__(self) -> None:
        for name in self.arms:
            if not name or name.startswith(".") or "/" in name or name == RESULTS:
                raise ConfigError(f"arms has {name!r}, which can't name a folder of runs. Choose another name.")
        given = [part for arguments in (self.arguments, *self.arms.values()) for part in arguments]
        if taken := [part for part in given if part.split("=", 1)[0] in GIVEN]:
            raise ConfigError(f"{taken[0]} is what the study gives each run itself. Leave it out; seeds has the seeds.")
        for pair in self.comparisons:
            if wrong := [arm for arm in pair if arm not in self.arms]:
                raise ConfigError(f"comparisons has {wrong[0]!r}, which isn't an arm. Arms are {', '.join(self.arms)}.")
        if len({frozenset(pair) for pair in self.comparisons}) < len(self.comparisons):
            raise ConfigError("comparisons has a pair twice, which would count as two tests. Give each once.")
        if same := [first for first, second in self.comparisons if first == second]:
            raise ConfigError(f"comparisons holds {same[0]!r} against itself. Give two arms.")
        for name in ("arms", "seeds", "curves"):
            listed = list(getattr(self, name))
            if not listed or len(set(listed)) < len(listed):
                raise ConfigError(f"{name} are {listed}. Give at least one, and each once.")
        for name, value in (
            ("threads", self.threads),
            *(("epochs", m.epochs) for m in (self.primary, *self.secondary)),
        ):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")

    @property
    def cells(self) -> list[Cell]:
        """All runs, seed by seed: after each seed all arms can be compared."""
        return [Cell(arm, seed) for seed in self.seeds for arm in self.arms]


def read_study(path: Path) -> Study:
    """Reads a study's file.

    Raises:
        ConfigError: if it isn't one, with what is wrong.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study")
    try:
        given = {"study": yaml.safe_load(path.read_text())}
        study: Study = parser.instantiate(parser.parse_object(given)).study
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}). Give a study's YAML file.") from error
    except (ArgumentError, ConfigError, yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} isn't a study: {' '.join(str(error).split())}") from error
    return study
