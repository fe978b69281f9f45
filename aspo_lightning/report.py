"""``aspo report RUN_DIR...``: the curves of finished runs as a figure, and their numbers as a table."""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from aspo_lightning.errors import ConfigError

PANELS = [
    ("rollout/accuracy", "accuracy of the rollouts"),
    ("policy/entropy", "entropy (nats)"),
    ("policy/clip_fraction_positive", "clip fraction, A > 0"),
    ("policy/clip_fraction_negative", "clip fraction, A < 0"),
]
EDGE = 5  # epochs that the table averages at either end

Curves = dict[str, list[tuple[int, float]]]


def read_run(folder: Path) -> Curves:
    """(step, value) by TensorBoard tag.

    Raises:
        ConfigError: if the folder holds no run.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(folder.glob("events.out.tfevents.*")):
        raise ConfigError(f"{folder} holds no TensorBoard events. Give a run's folder, like runs/quickstart/version_0.")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def table(runs: dict[str, Curves]) -> str:
    """Markdown: accuracy of the first and last epochs, and each benchmark before and after."""
    benchmarks = sorted({tag for curves in runs.values() for tag in curves if tag.startswith("eval/")})
    names = [f"accuracy, first {EDGE} → last {EDGE} epochs", *(b.removeprefix("eval/") for b in benchmarks)]
    rows = [["run", *names], ["---"] * (len(names) + 1)]
    for name, curves in runs.items():
        accuracy = [value for _, value in curves.get("rollout/accuracy", [])]
        cells = [change(accuracy[:EDGE], accuracy[-EDGE:])]
        cells += [
            change([v for _, v in curves.get(b, [])][:1], [v for _, v in curves.get(b, [])][-1:]) for b in benchmarks
        ]
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def change(before: Sequence[float], after: Sequence[float]) -> str:
    if not before:
        return "-"
    first, last = statistics.mean(before), statistics.mean(after)
    return f"{first:.2f} → {last:.2f} ({last - first:+.2f})"


def figure(runs: dict[str, Curves], path: Path) -> None:
    """Writes the panels as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3), constrained_layout=True)
    for axis, (tag, title) in zip(axes, PANELS, strict=True):
        for name, curves in runs.items():
            points = curves.get(tag, [])
            axis.plot([step for step, _ in points], [value for _, value in points], label=name)
        axis.set(title=title, xlabel="optimizer step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="aspo report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders like runs/quickstart/version_0")
    parser.add_argument("--figure", type=Path, default=Path("report.png"), help="where the figure goes (%(default)s)")
    options = parser.parse_args(arguments)
    runs = {f"{folder.resolve().parent.name}/{folder.resolve().name}": read_run(folder) for folder in options.runs}
    figure(runs, options.figure)
    print(f"{table(runs)}\n\nFigure: {options.figure}")
