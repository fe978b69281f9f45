"""``aspo report RUN_DIR... | RESULT... | STUDY``: runs, evaluations side by side, or a study: a figure and a table."""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from aspo_lightning.errors import ConfigError
from aspo_lightning.evaluation import paper
from aspo_lightning.evaluation.metrics import interval, scores
from aspo_lightning.evaluation.results import RESULT, Interval, Result, show
from aspo_lightning.identity import flat
from aspo_lightning.markdown import markdown_table
from aspo_lightning.run.curves import Curves, by_epoch, read_run
from aspo_lightning.run.disk import check_writable
from aspo_lightning.study import against
from aspo_lightning.study import report as study_report
from aspo_lightning.study.folder import StudyResults
from aspo_lightning.study.table import results as without_clocks

PICTURES = (".png", ".pdf", ".svg", ".jpg")
CURVES = ["rollout/accuracy", "policy/entropy", "policy/clip_fraction_positive", "policy/clip_fraction_negative"]
"""Drawn of runs, if nothing else is asked for."""

DIFFERENT = 3
"""The exit status where runs aren't like the reference; 1 and 2 are errors."""

EDGE = 5  # epochs that the table averages at either end


def table(runs: Mapping[str, Curves]) -> str:
    """Markdown: accuracy of the first and last epochs, and each benchmark before and after."""
    benchmarks = sorted({tag for curves in runs.values() for tag in curves if tag.startswith("eval/")})
    names = [f"accuracy, first {EDGE} → last {EDGE} epochs", *(b.removeprefix("eval/") for b in benchmarks)]
    rows = []
    for name, curves in runs.items():
        accuracy = [value for _, value in curves.get("rollout/accuracy", [])]
        cells = [change(accuracy[:EDGE], accuracy[-EDGE:])]
        cells += [
            change([v for _, v in curves.get(b, [])][:1], [v for _, v in curves.get(b, [])][-1:]) for b in benchmarks
        ]
        rows.append([name, *cells])
    return markdown_table(["run", *names], rows)


def change(before: Sequence[float], after: Sequence[float]) -> str:
    if not before:
        return "-"
    first, last = statistics.mean(before), statistics.mean(after)
    return f"{first:.2f} → {last:.2f} ({last - first:+.2f})"


def figure(runs: Mapping[str, Curves], tags: Sequence[str], path: Path) -> None:
    """Writes a picture with a chart for each tag."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, grid = pyplot.subplots(1, len(tags), figsize=(4 * len(tags), 3), layout="constrained", squeeze=False)
    axes = grid[0]
    for axis, tag in zip(axes, tags, strict=True):
        for name, curves in runs.items():
            points = curves.get(tag, [])
            axis.plot([step for step, _ in points], [value for _, value in points], label=name)
        axis.set(title=tag, xlabel="optimizer step", ylim=(min(0, axis.get_ylim()[0]), None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def check_each_once(folders: Sequence[Path]) -> None:
    """Raises ConfigError for a run that is given twice: it would count twice in a test, and once in a table."""
    paths = [folder.resolve() for folder in folders]
    if twice := [folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1]:
        raise ConfigError(f"{twice[0]} is given twice. Give each run once.")


def labels(folders: Sequence[Path]) -> list[str]:
    """The ends of the runs' paths, as long as it takes to tell them apart; no run is given twice."""
    paths = [folder.resolve() for folder in folders]
    return next(
        ends
        for parts in range(2, 2 + max(len(path.parts) for path in paths))
        if len(set(ends := ["/".join(path.parts[-parts:]) for path in paths])) == len(paths)
    )


def check_curves(tags: Sequence[str], runs: Sequence[Mapping[str, object]]) -> None:
    """Raises ConfigError for one that no run has."""
    known = {tag for curves in runs for tag in curves}
    if missing := [tag for tag in tags if tag not in known]:
        raise ConfigError(f"--curves has {missing[0]}, which isn't logged here. There are {', '.join(sorted(known))}.")


def read_result(path: Path) -> Result:
    """An evaluation's result, from its folder or its file.

    Raises:
        ConfigError: if it isn't one, or isn't finished.
    """
    file = path / RESULT if path.is_dir() else path
    try:
        result: Result = json.loads(file.read_text())
        result["settings"]["benchmarks"], [p["solved"] for b in result["benchmarks"].values() for p in b["problems"]]
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} holds no {RESULT}: that evaluation isn't finished. Run the same command again: it resumes."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} isn't a result of `aspo test`.") from error
    return result


def comparison(results: Mapping[str, Result]) -> str:
    """Markdown: a row for each evaluation and, where it has the benchmarks, for each model of the paper.

    Scores in percent with 95% intervals. A score is marked where its difference to the first row's, problem by problem,
    has an interval that holds 0; the paper's, of which no problems are known, where the first row's interval holds it.
    """
    first = next(iter(results.values()))
    columns = {
        f"{name}/{key}": None
        for result in results.values()
        for name, benchmark in result["benchmarks"].items()
        for key in benchmark["measurements"]
        if "@" in key
    }
    rows = []
    for label, result in results.items():
        cells = [label]
        for column in columns:
            name, key = column.rsplit("/", 1)
            measured = measurements(result, name).get(key)
            mark = " ≈" if result is not first and measured and within_chance(first, result, name, key) else ""
            cells.append(show(measured) + mark if measured else "-")
        rows.append(cells)
    for model, numbers in paper.ROWS.items():
        if any(column in numbers for column in columns):
            cells = [f"{numbers[c]:.1f}{' ≈' * _holds(first, c, numbers[c])}" if c in numbers else "-" for c in columns]
            rows.append([f"paper: {model}", *cells])
    lines = [markdown_table(["model", *columns], rows)]
    if any("≈" in line for line in lines):
        lines += ["", "≈: not told apart from the first row: the 95% interval of the difference holds 0."]
        lines[-1] += " Of the paper's: the first row's interval holds the number."
    return "\n".join([*lines, *other_settings(results)])


def _holds(result: Result, column: str, percent: float) -> bool:
    """Whether an evaluation's interval holds the number."""
    name, key = column.rsplit("/", 1)
    measured = measurements(result, name).get(key)
    return measured is not None and measured["low"] <= percent / 100 <= measured["high"]


def measurements(result: Result, benchmark: str) -> dict[str, Interval]:
    """The measurements of a benchmark; none if it isn't in the evaluation."""
    return result["benchmarks"][benchmark]["measurements"] if benchmark in result["benchmarks"] else {}


def within_chance(first: Result, other: Result, name: str, key: str) -> bool:
    """Whether a difference could be chance. False where the problems aren't the same: nothing is said about those."""
    both = (first, other)
    conditions = [result["settings"]["benchmarks"].get(name) for result in both]
    if len({c and c.get("prompts") for c in conditions}) > 1 or not all(key in measurements(r, name) for r in both):
        return False
    k = int(key.rpartition("@")[2])
    problems = [[(p["solved"], p["answers"]) for p in result["benchmarks"][name]["problems"]] for result in both]
    before, after = (scores(of_one, [k])[key] for of_one in problems)
    low, high = interval([y - x for x, y in zip(before, after, strict=True)])
    return low <= 0 <= high


def other_settings(results: Mapping[str, Result]) -> list[str]:
    """Lines that say in what the evaluations differ, besides the model."""
    settings = [
        flat({k: v for k, v in r["settings"].items() if k not in ("model", "weights")}) for r in results.values()
    ]
    keys = sorted({key for s in settings for key in s})
    different = {key: [s.get(key) for s in settings] for key in keys if len({repr(s.get(key)) for s in settings}) > 1}
    return [f"\nNot the same: {key} is {', '.join(map(str, values))}." for key, values in different.items()]


def intervals_figure(results: Mapping[str, Result], path: Path) -> None:
    """Writes a picture of all avg@k with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list({name: None for result in results.values() for name in result["benchmarks"]})
    drawing, axis = pyplot.subplots(figsize=(5 + 1.5 * len(names), 4), constrained_layout=True)
    for i, (label, result) in enumerate(results.items()):
        points = []
        for at, name in enumerate(names):
            for key, m in measurements(result, name).items():
                if key.startswith("avg@"):
                    value, low, high = 100 * m["value"], 100 * m["low"], 100 * m["high"]
                    points.append((at + (i - (len(results) - 1) / 2) * 0.15, value, value - low, high - value))
        if points:
            x, y, below, above = zip(*points, strict=True)
            axis.errorbar(x, y, yerr=[below, above], fmt="o", capsize=3, label=label)
    axis.set(xticks=range(len(names)), xticklabels=names, ylabel="avg@k (%)", ylim=(0, None))
    axis.grid(alpha=0.3, axis="y")
    axis.legend()
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def hold_against(folders: Sequence[Path], results: StudyResults, arm: str | None) -> None:
    """Prints the verdict, and exits with ``DIFFERENT`` if that is what the runs are."""
    if not results.exists:
        raise ConfigError(
            f"--against is {results.path}, which holds no study.yaml and curves.csv. Give a study's results."
        )
    check_each_once(folders)
    name, reference = results.arm(arm)
    new = [without_clocks(by_epoch(read_run(folder))) for folder in folders]
    verdict = against.against(reference, new)
    print(against.describe(verdict, f"{results.path}, {name}", len(reference), len(new)))
    if not verdict.same:
        sys.exit(DIFFERENT)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="aspo report", description=__doc__)
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="RUN_DIR | RESULT", help="runs/quickstart/version_0, or results/MODEL"
    )
    parser.add_argument("--figure", type=Path, help="where the figure goes (report.png)")
    parser.add_argument("--curves", nargs="+", metavar="TAG", help="what is drawn of runs, or of a study")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="a study's results: says whether the runs are like those, and exits with 3 if they aren't",
    )
    parser.add_argument("--arm", help="which of the study's arms they are held against, if it has several")
    options = parser.parse_args(arguments)
    if options.against is not None:
        if options.figure or options.curves:
            raise ConfigError("--figure and --curves are of a picture, and --against draws none.")
        hold_against(options.sources, StudyResults(options.against), options.arm)
        return
    if options.arm is not None:
        raise ConfigError("--arm is of --against, which wasn't given.")
    picture = options.figure or Path("report.png")
    check_writable(picture.parent, "--figure")
    if picture.suffix not in PICTURES:
        raise ConfigError(f"--figure is {picture}; its name must end with one of {', '.join(PICTURES)}.")
    if len(options.sources) == 1 and (kept := StudyResults(options.sources[0])).exists:
        study, found = kept.study(), kept.table()
        drawn = options.curves or study.curves
        check_curves(options.curves or [], [curves for seeds in found.values() for curves in seeds.values()])
        study_report.figure(replace(study, curves=drawn), found, picture)
        print(f"{kept.report()}\n\nFigure: {picture}")
        return
    evaluations = [p for p in options.sources if p.suffix == ".json" or (p / "settings.json").is_file()]
    if evaluations and len(evaluations) < len(options.sources):
        other = next(p for p in options.sources if p not in evaluations)
        raise ConfigError(f"{evaluations[0]} is an evaluation and {other} is not. Report on runs or on evaluations.")
    if evaluations:
        if options.curves:
            raise ConfigError(f"--curves is of runs and studies, and {evaluations[0]} is an evaluation.")
        results = {str(p.parent if p.name == RESULT else p): read_result(p) for p in evaluations}
        intervals_figure(results, picture)
        text = comparison(results)
    else:
        check_each_once(options.sources)
        runs = dict(zip(labels(options.sources), map(read_run, options.sources), strict=True))
        drawn = options.curves or CURVES
        check_curves(options.curves or [], list(runs.values()))
        figure(runs, drawn, picture)
        text = table(runs)
    print(f"{text}\n\nFigure: {picture}")
