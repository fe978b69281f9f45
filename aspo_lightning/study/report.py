"""What a study found: tables in Markdown, and a figure of its curves, both with intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aspo_lightning.markdown import markdown_table
from aspo_lightning.study import statistics
from aspo_lightning.study.statistics import Estimate
from aspo_lightning.study.study import Measure, Study
from aspo_lightning.study.table import RunCurves, Table, last, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def show(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def values(runs: Mapping[int, RunCurves], measure: Measure) -> list[float]:
    """The measure of each run that has it, in the order of their seeds."""
    found = [last(curves, measure.tag, measure.epochs) for _, curves in sorted(runs.items())]
    return [value for value in found if np.isfinite(value)]


def markdown(study: Study, table: Table, seconds: Table) -> str:
    """The planned comparisons, then all measures by arm, with the seconds that training took where they are known."""
    note = "Means over seeds with 95% intervals (Student's; Welch's of differences)."
    compared = [comparisons(study, table)] if study.comparisons else []
    return "\n\n".join([study.question.strip(), *compared, *too_few(study), measures(study, table, seconds), note])


def too_few(study: Study) -> list[str]:
    """Says so where not even the largest difference would be found."""
    seeds, tests = len(study.seeds), len(study.comparisons)
    least = min(1.0, tests * statistics.smallest_chance(seeds, seeds))
    if least <= 0.05:
        return []
    return [
        f"{seeds} seeds can't show a difference here, however large: the smallest p of {tests} comparison"
        f"{'s' * (tests > 1)} of so few runs is {least:.2f}."
    ]


def complete(study: Study, table: Table) -> dict[str, list[float]]:
    """The primary measure by arm, without the arms of which a run has no value: the others are a selection."""
    found = {arm: values(runs, study.primary) for arm, runs in table.items()}
    return {arm: measured for arm, measured in found.items() if measured and len(measured) == len(table[arm])}


def comparisons(study: Study, table: Table) -> str:
    found = complete(study, table)
    chances = [
        float(statistics.permutation_test(*(np.array(found[arm])[:, None] for arm in pair))[0])
        if found.keys() >= set(pair)
        else 1.0
        for pair in study.comparisons
    ]
    rows = []
    for pair, p, adjusted in zip(study.comparisons, chances, statistics.holm(chances), strict=True):
        said = ["-"] * 3
        if found.keys() >= set(pair):
            said = [show(statistics.difference(*(found[arm] for arm in pair))), f"{p:.3g}", f"{adjusted:.3g}"]
        rows.append([" - ".join(pair), *said])
    return markdown_table(["comparison", f"difference of {study.primary}", "p", "p, Holm"], rows)


def measures(study: Study, table: Table, seconds: Table) -> str:
    columns = [study.primary, *study.secondary]
    titles = ["arm", "runs", *map(str, columns), *["seconds of all epochs"] * bool(seconds)]
    rows = []
    for arm in study.arms:
        runs = table.get(arm, {})
        cells = [_cell(values(runs, m), len(runs)) for m in columns]
        if seconds:
            took = [sum(v for times in run.values() for v in times.values()) for run in seconds.get(arm, {}).values()]
            cells.append(_cell(took, len(runs)))
        rows.append([arm, str(len(runs)), *cells])
    return markdown_table(titles, rows)


def _cell(found: Sequence[float], runs: int) -> str:
    """Says of how many runs it is where some have no finite value."""
    some = f" ({len(found)} of {runs})" if len(found) < runs else ""
    return f"{show(statistics.mean(found))}{some}" if found else "-"


def figure(study: Study, table: Table, path: Path) -> None:
    """Writes a picture: the comparisons; and a chart for each curve, a line for each arm, bands for the intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    charts = len(study.curves) + bool(study.comparisons)
    columns = math.ceil(math.sqrt(charts))
    rows = -(-charts // columns)
    drawing, grid = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for axis in axes[charts:]:
        axis.set_visible(False)
    if study.comparisons:
        _draw_comparisons(study, table, axes.pop(0))
    for axis, tag in zip(axes, study.curves, strict=False):
        for i, arm in enumerate(study.arms):
            found = {epoch: statistics.mean(v) for epoch, v in series(table.get(arm, {}).values(), tag).items()}
            if found:
                style = "-" if i < 10 else "--"  # there are ten colors
                axis.plot(
                    list(found), [e.value for e in found.values()], style, color=f"C{i}", linewidth=1.2, label=arm
                )
                band = [[getattr(e, end) for e in found.values()] for end in ("low", "high")]
                axis.fill_between(list(found), *band, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set(title=tag, xlabel="epoch")
        axis.grid(alpha=0.3)
    labels = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    drawing.legend(handles=[*labels.values()], loc="outside lower center", ncols=min(len(labels) or 1, 2 * columns))
    drawing.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(drawing)


def _draw_comparisons(study: Study, table: Table, axis: "Axes") -> None:
    """Differences with their intervals, the first at the top."""
    found = complete(study, table)
    for at, pair in enumerate(study.comparisons):
        if found.keys() >= set(pair):
            value, low, high = statistics.difference(*(found[arm] for arm in pair))
            axis.errorbar(value, at, xerr=[[value - low], [high - value]], fmt="o", color="black", capsize=3)
    axis.axvline(0, color="gray", linewidth=0.8)
    names = [" - ".join(pair) for pair in study.comparisons]
    axis.set(title=f"difference of {study.primary}", yticks=range(len(names)), yticklabels=names)
    axis.set(ylim=(len(names) - 0.5, -0.5))
    axis.grid(alpha=0.3, axis="x")
