"""The folder that keeps an evaluation: of one model under one set of settings.

It holds ``result.json`` (settings, versions, measurements, scores of each problem), ``completions.jsonl`` and
``table.md``; until all is done, ``journal/`` holds what is done so far, and the evaluation resumes from there.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from torch import distributed as dist

from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.evaluation.metrics import Measurement
from aspo_lightning.identity import differences
from aspo_lightning.markdown import markdown_table
from aspo_lightning.run.disk import write_text
from aspo_lightning.run.provenance import versions
from aspo_lightning.types import Known, RolloutGroup

RESULT, COMPLETIONS, TABLE = "result.json", "completions.jsonl", "table.md"

SETTINGS, JOURNAL = "settings.json", "journal"


class BenchmarkConditions(TypedDict):
    """What the numbers of one benchmark depend on."""

    sampling: dict[str, float]
    """By ``rollouts.settings.Sampling``."""
    prompts: str
    """Digest of its problems."""
    task: object


class Conditions(TypedDict):
    """All that the numbers of an evaluation depend on, as plain data."""

    model: str
    weights: str
    """Digest."""
    max_prompt_length: int
    k: list[int]
    reward_timeout_s: float
    engine: object
    benchmarks: dict[str, BenchmarkConditions]


class Problem(TypedDict):
    """Of each of its completions: reward, whether it is a full solution, and what it answers."""

    id: str
    rewards: list[float]
    solved: list[bool]
    answers: list[str | None]


class Interval(TypedDict):
    """A ``Measurement`` as plain data."""

    value: float
    low: float
    high: float


class BenchmarkResult(TypedDict):
    """What came of one benchmark."""

    measurements: dict[str, Interval]
    problems: list[Problem]


class Result(TypedDict):
    """``result.json``."""

    settings: Conditions
    versions: dict[str, str]
    benchmarks: dict[str, BenchmarkResult]


class Results:
    """The folder of an evaluation. Every rank has one; the first writes what is common to all.

    Args:
        folder: where it is.
        settings: all that the numbers depend on.

    Raises:
        ConfigError: if the folder holds something else.
    """

    def __init__(self, folder: Path, settings: Conditions) -> None:
        self.folder = folder
        self.settings: Conditions = json.loads(json.dumps(settings))
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        check_folder(folder, self.settings)
        _barrier()  # all have looked before one writes
        if self.rank == 0 and not (folder / SETTINGS).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SETTINGS, json.dumps(self.settings, indent=2) + "\n")
        self._known = read_known(folder)
        self._measured: dict[str, tuple[Sequence[RolloutGroup], dict[str, Measurement]]] = {}
        _barrier()  # all have read before one adds to it

    def journal(self, benchmark: str) -> "FileJournal":
        """Where the sampling of a benchmark keeps what is done."""
        return FileJournal(self.folder / JOURNAL / f"rank_{self.rank}.jsonl", benchmark, self._known)

    def add(self, benchmark: str, groups: Sequence[RolloutGroup], measurements: dict[str, Measurement]) -> None:
        """Takes what came of a benchmark."""
        self._measured[benchmark] = (groups, measurements)

    def finish(self) -> None:
        """Writes everything; the journal is no longer needed then."""
        _barrier()
        if self.rank == 0:
            lines = [
                {
                    "benchmark": benchmark,
                    "id": group.prompt.id,
                    "sample": sample,
                    "prompt": group.prompt.text,
                    "text": rollout.text,
                    **self._known_or_read(benchmark, group.prompt.id, sample),
                }
                for benchmark, (groups, _) in self._measured.items()
                for group in groups
                for sample, rollout in enumerate(group.rollouts)
            ]
            write_text(
                self.folder / COMPLETIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            )
            result: Result = {
                "settings": self.settings,
                "versions": versions(),
                "benchmarks": {
                    name: {
                        "measurements": {
                            key: Interval(value=m.value, low=m.low, high=m.high) for key, m in measurements.items()
                        },
                        "problems": [
                            {
                                "id": g.prompt.id,
                                "rewards": [r.reward for r in g.rollouts],
                                "solved": [r.solved for r in g.rollouts],
                                "answers": [r.answer for r in g.rollouts],
                            }
                            for g in groups
                        ],
                    }
                    for name, (groups, measurements) in self._measured.items()
                },
            }
            write_text(self.folder / TABLE, table(result) + "\n")
            write_text(self.folder / RESULT, json.dumps(result, indent=1, allow_nan=True) + "\n")
            shutil.rmtree(self.folder / JOURNAL, ignore_errors=True)
        _barrier()

    def _known_or_read(self, benchmark: str, id: str, sample: int) -> Known:
        if (key := (benchmark, id, sample)) not in self._known:
            self._known |= read_known(self.folder)  # what the other ranks have added
        return self._known[key]


class FileJournal:
    """Keeps what is known of a benchmark's completions as lines of JSON; see ``sampling.Journal``."""

    def __init__(self, path: Path, benchmark: str, known: dict[tuple[str, str, int], Known]) -> None:
        self._path, self._benchmark, self._known = path, benchmark, known

    def get(self, prompt_id: str, sample: int) -> Known:
        return self._known.get((self._benchmark, prompt_id, sample), {})

    def add(self, prompt_id: str, sample: int, **known: Unpack[Known]) -> None:
        self._known.setdefault((self._benchmark, prompt_id, sample), {}).update(known)
        self._path.parent.mkdir(exist_ok=True)
        line = {"benchmark": self._benchmark, "id": prompt_id, "sample": sample, **known}
        with self._path.open("a") as file:
            file.write("\n" + json.dumps(line))  # the line break first: it ends a line that a kill has torn


def read_known(folder: Path) -> dict[tuple[str, str, int], Known]:
    """What the folder holds of each completion, by benchmark, problem and sample."""
    known: dict[tuple[str, str, int], Known] = {}
    for path in [folder / COMPLETIONS, *sorted((folder / JOURNAL).glob("*.jsonl"))]:
        if not path.exists():
            continue
        for line in path.read_text(errors="replace").split("\n"):  # a text may hold other ends of lines
            try:
                record = json.loads(line)
                key = record.pop("benchmark"), record.pop("id"), record.pop("sample")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # torn by a kill: what it held is done again
            if not all(isinstance(part, (str, int)) for part in key):
                continue
            for name in ("prompt", "text"):
                record.pop(name, None)
            known.setdefault(key, {}).update(record)
    return known


def check_folder(folder: Path, settings: Conditions) -> None:
    """Checks that the folder is empty, or one in which an evaluation with these settings resumes.

    Raises:
        ConfigError: if it holds something else.
        RunError: if it is damaged.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Choose another folder for the results with --out.")
    if not (folder / SETTINGS).is_file():
        if any(folder.iterdir()):
            raise ConfigError(f"{folder} holds something other than an evaluation. Choose another place with --out.")
        return
    try:
        there = json.loads((folder / SETTINGS).read_text())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{folder / SETTINGS} is damaged: {error}. Choose another folder with --out.") from error
    for key, (before, now) in differences(there, settings).items():
        raise ConfigError(
            f"{folder} holds results of another evaluation: {key} is {before!r} there and {now!r} here. Nothing was "
            "touched; choose another folder with --out."
        )


def table(result: Result) -> str:
    """Markdown: a line for each benchmark."""
    rows = []
    for name, benchmark in result["benchmarks"].items():
        measured = benchmark["measurements"]
        scores = [f"{key} {show(value)}" for key, value in measured.items() if "@" in key]
        rows.append(
            [
                name,
                str(len(benchmark["problems"])),
                "<br>".join(scores),
                f"{measured['length']['value']:.0f}",
                f"{measured['truncated_fraction']['value']:.1%}",
                f"{measured['repetition_rate']['value']:.1%}",
            ]
        )
    return markdown_table(["benchmark", "problems", "score (95% interval)", "length", "truncated", "repetition"], rows)


def show(measurement: Interval) -> str:
    """In percent: 49.0 (43.1-55.2)."""
    value, low, high = 100 * measurement["value"], 100 * measurement["low"], 100 * measurement["high"]
    return f"{value:.1f}" if math.isnan(low) else f"{value:.1f} ({low:.1f}-{high:.1f})"


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
