"""Runs as the page holds them: their curves by epoch, and the completions of the epochs that were kept."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from aspo_lightning.errors import ConfigError
from aspo_lightning.run.curves import Curves, epoch_of_step
from aspo_lightning.run.folder import RunFolder, is_run
from aspo_lightning.run.rollout_files import rollout_files
from aspo_lightning.run.tags import TAGS
from aspo_lightning.view.completions import number_or_none, read_epoch, visible
from aspo_lightning.view.weights import COMPARED, objectives


class Panel(NamedTuple):
    """A chart."""

    title: str
    series: dict[str, str]
    """What the chart calls a curve, by its tag."""


PANELS = (
    Panel("Reward and accuracy", {"rollout/reward": "reward", "rollout/accuracy": "accuracy"}),
    Panel("Entropy (nats)", {"policy/entropy": "entropy"}),
    Panel("Clip fraction", {"policy/clip_fraction_positive": "A > 0", "policy/clip_fraction_negative": "A < 0"}),
    Panel("KL to the reference (nats)", {"policy/kl": "KL"}),
    Panel("Ratio", {"policy/ratio_positive": "A > 0", "policy/ratio_negative": "A < 0"}),
    Panel(
        "Length (tokens)",
        {"rollout/length": "all", "rollout/length_right": "right", "rollout/length_wrong": "wrong"},
    ),
    Panel("Truncated", {"rollout/truncated_fraction": "truncated"}),
    Panel(
        "Repetition",
        {
            "rollout/repetition_rate": "all",
            "rollout/repetition_rate_right": "right",
            "rollout/repetition_rate_wrong": "wrong",
        },
    ),
    Panel(
        "Seconds by part",
        {
            "time/generate_s": "generate",
            "time/wait_s": "wait",
            "time/reward_s": "reward",
            "time/score_s": "score",
            "time/update_s": "update",
            "time/sync_s": "sync",
        },
    ),
)


class Point(NamedTuple):
    """Of a curve."""

    epoch: int
    step: int | None
    """None: the run keeps completions only, which don't say it."""
    value: float | None


@dataclass
class Run:
    """A run as the page holds it."""

    name: str
    folder: Path
    points: dict[str, list[Point]] = field(default_factory=dict)
    epochs: dict[int, dict[str, object]] = field(default_factory=dict)
    """The completions, by epoch."""
    notes: list[str] = field(default_factory=list)
    """What the page says about it."""


def read(folder: Path, name: str, curves: Curves, limit: int) -> Run:
    """Reads a run.

    Args:
        folder: the run's.
        name: what the page calls it.
        curves: from its TensorBoard events. Empty: they are made from its completions.
        limit: how many completions of an epoch the page takes.

    Raises:
        ConfigError: if it is no run, or has nothing to show yet.
        RunError: if a file of it is damaged.
    """
    files = rollout_files(folder)
    if not files and not curves:
        if not is_run(folder):
            raise ConfigError(f"{folder} isn't a run's folder. Give one like runs/quickstart/version_0.")
        raise ConfigError(f"{folder} has neither TensorBoard events nor rollouts yet: there is nothing to show.")
    run = Run(name, folder)
    try:
        by = objectives(RunFolder(folder).config())
    except ConfigError as error:
        by = COMPARED
        run.notes.append(f"{error}. Weights are those under ASPO and GRPO.")
    means: dict[str, list[Point]] = {}
    for epoch, path in tqdm(files.items(), desc=f"Reading {name}", unit="epoch", delay=2, leave=False):
        found = read_epoch(path, limit, by)
        run.epochs[epoch] = found.page
        for tag, value in found.means.items():
            means.setdefault(tag, []).append(Point(epoch, None, number_or_none(value)))
    run.points = by_epoch(curves) or means
    if not curves:
        run.notes.append("No TensorBoard events: the curves are made from the kept completions.")
    if not files:
        run.notes.append("No completions were kept (rollouts/ is missing): there are curves only.")
    return run


def by_epoch(curves: Curves) -> dict[str, list[Point]]:
    """The curves of the panels, by epoch. Of a step that was logged again, after a resume, the last value counts."""
    if "epoch" not in curves:
        return {}
    epoch_of = epoch_of_step(curves)
    tags = [tag for panel in panels([curves]) for tag in panel.series]
    return {
        tag: [Point(epoch_of(step), step, number_or_none(value)) for step, value in sorted(dict(curves[tag]).items())]
        for tag in tags
        if tag in curves
    }


def panels(runs: Iterable[Mapping[str, object]]) -> list[Panel]:
    """The charts for runs that have these tags, with the held-out accuracies as the last."""
    tags = {tag for run in runs for tag in run}
    held_out = {tag: tag.removeprefix("eval/") for tag in sorted(tags) if tag.startswith("eval/") and "/avg@" in tag}
    kept = [Panel(p.title, {t: label for t, label in p.series.items() if t in tags}) for p in PANELS]
    return [panel for panel in [*kept, Panel("Held out", held_out)] if panel.series]


def page_run(run: Run) -> dict[str, object]:
    """A run as JSON, without its completions."""
    differences: dict[int, float] = {
        epoch: found["difference"] for epoch, page in run.epochs.items() if isinstance(found := page["standout"], dict)
    }
    return {
        "standout": max(differences, key=differences.__getitem__, default=None),
        "name": visible(run.name),
        "folder": visible(str(run.folder)),
        "points": run.points,
        "epochs": list(run.epochs),
        "notes": [visible(note) for note in run.notes],
    }


def page_panel(panel: Panel) -> dict[str, object]:
    """A chart as JSON."""
    meanings = [TAGS.get(tag, label) for tag, label in panel.series.items()]
    return {"title": panel.title, "series": panel.series, "meaning": "; ".join(meanings).replace("`", "")}
