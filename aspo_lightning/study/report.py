"""What a study found: tables in Markdown, and a figure of its curves, both with intervals over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aspo_lightning.study import statistics
from aspo_lightning.study.statistics import Estimate
from aspo_lightning.study.study import Measure, Study
from aspo_lightning.study.table import RunCurves, Table, last, series

COLUMNS = 4
"""Charts beside each other."""


def show(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def values(runs: Mapping[int, RunCurves], measure: Measure) -> list[float]:
    """The measure of each run that has it, in the order of their seeds."""
    found = [last(curves, measure.tag, measure.epochs) for _, curves in sorted(runs.items())]
    return [value for value in found if np.isfinite(value)]


def markdown(study: Study, table: Table) -> str:
    """The planned comparisons, then all measures by arm."""
    return "\n".join([study.question, "", *comparisons(study, table), "", *measures(study, table)])


def comparisons(study: Study, table: Table) -> list[str]:
    pairs = [
        (first, second, values(table.get(first, {}), study.primary), values(table.get(second, {}), study.primary))
        for first, second in study.comparisons
    ]
    if not pairs:
        return []
    chances = [
        float(statistics.permutation_test(np.array(x)[:, None], np.array(y)[:, None])[0]) if x and y else 1.0
        for _, _, x, y in pairs
    ]
    rows = [["comparison", f"difference of {study.primary}", "p", "p, Holm"], ["---"] * 4]
    for (first, second, x, y), p, adjusted in zip(pairs, chances, statistics.holm(chances), strict=True):
        cell = show(statistics.difference(x, y)) if x and y else "-"
        rows.append([f"{first} - {second}", cell, f"{p:.3f}", f"{adjusted:.3f}"])
    return [_line(row) for row in rows]


def measures(study: Study, table: Table) -> list[str]:
    columns = [study.primary, *study.secondary]
    rows = [["arm", "runs", *map(str, columns)], ["---"] * (len(columns) + 2)]
    for arm in study.arms:
        runs = table.get(arm, {})
        cells = [_cell(values(runs, m), len(runs)) for m in columns]
        rows.append([arm, str(len(runs)), *cells])
    return [
        *(_line(row) for row in rows),
        "",
        "Means over seeds with 95% intervals (Student's; Welch's of differences).",
    ]


def _cell(found: Sequence[float], runs: int) -> str:
    """Says of how many runs it is where some have no finite value."""
    some = f" ({len(found)} of {runs})" if len(found) < runs else ""
    return f"{show(statistics.mean(found))}{some}" if found else "-"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def figure(study: Study, table: Table, path: Path) -> None:
    """Writes a picture: a chart for each curve, a line for each arm, bands for the intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(study.curves) // COLUMNS)
    columns = min(COLUMNS, len(study.curves))
    drawing, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), constrained_layout=True, squeeze=False
    )
    for axis, tag in zip(axes.flat, study.curves, strict=False):
        for i, arm in enumerate(study.arms):
            found = {epoch: statistics.mean(v) for epoch, v in series(table.get(arm, {}).values(), tag).items()}
            if found:
                axis.plot(list(found), [e.value for e in found.values()], color=f"C{i}", linewidth=1.2)
                band = [[getattr(e, end) for e in found.values()] for end in ("low", "high")]
                axis.fill_between(list(found), *band, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set(title=tag, xlabel="epoch")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(study.curves) :]:
        axis.set_visible(False)
    lines = [pyplot.Line2D([], [], color=f"C{i}", label=arm) for i, arm in enumerate(study.arms)]
    axes.flat[0].legend(handles=lines, fontsize="small")
    drawing.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(drawing)
