"""Whether new runs are like those of a reference: a verdict with a known rate of false alarms."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from aspo_lightning.errors import ConfigError
from aspo_lightning.study import statistics
from aspo_lightning.study.table import RunCurves, epochs_of, in_all

LEVEL = 0.05
"""How often runs of the same code are called different."""

ROUNDING = "mismatch/"
"""The beginning of tags that aren't compared: how far engine and trainer round apart is the processor's business."""

LAST_PART = 0.2
"""The share of a curve that is its end."""


class Compared(NamedTuple):
    """A measure of both."""

    name: str
    reference: float
    """Mean over the reference's runs."""
    new: float
    chance: float
    """By which that of all measures together is bounded."""


class Verdict(NamedTuple):
    """What can be said of the new runs."""

    same: bool
    measures: list[Compared]
    """Those that differ most come first."""
    left_out: list[str]
    """Tags that some run lacks."""


def against(reference: Sequence[RunCurves], new: Sequence[RunCurves]) -> Verdict:
    """Compares the whole and the end of every curve that all runs have.

    Raises:
        ConfigError: if the runs are too few to tell, of different lengths, or have no curve in common.
    """
    statistics.check_can_tell(len(reference), len(new))
    lengths = [sorted({epochs_of(curves) for curves in runs}) for runs in (reference, new)]
    if len(set(map(tuple, lengths))) > 1 or len(lengths[0]) > 1:
        raise ConfigError(
            f"The reference's runs have {_list(lengths[0])} epochs and these {_list(lengths[1])}. Train as long."
        )
    tags = [tag for tag in in_all([*reference, *new]) if not tag.startswith(ROUNDING)]
    if not tags:
        raise ConfigError("The runs have no curve in common with the reference.")
    values = [
        np.array([[f(run[tag]) for tag in tags for f in (_whole, _end)] for run in runs]) for runs in (reference, new)
    ]
    chances = statistics.permutation_test(*values)
    names = [f"{tag}, {part}" for tag in tags for part in ("whole", "end")]
    measures = [
        Compared(name, float(a), float(b), float(p))
        for name, a, b, p in zip(names, values[0].mean(0), values[1].mean(0), chances, strict=True)
    ]
    every = {tag for curves in (*reference, *new) for tag in curves if not tag.startswith(ROUNDING)}
    return Verdict(
        min(m.chance for m in measures) > LEVEL, sorted(measures, key=lambda m: m.chance), sorted(every - set(tags))
    )


def _whole(curve: Mapping[int, float]) -> float:
    return float(np.mean(list(curve.values())))


def _end(curve: Mapping[int, float]) -> float:
    values = [value for _, value in sorted(curve.items())]
    return float(np.mean(values[-max(1, round(LAST_PART * len(values))) :]))


def _list(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths))


def describe(verdict: Verdict, name: str, reference: int, new: int) -> str:
    """The verdict in words, with a table of what was compared."""
    differ = [m for m in verdict.measures if m.chance <= LEVEL]
    head = (
        f"Same as {name} ({new} runs against {reference}): no curve differs. Of runs with the same code one in twenty "
        "is called different."
        if verdict.same
        else f"Different from {name} ({new} runs against {reference}): {len(differ)} of {len(verdict.measures)} "
        "measures differ. Runs with the same code are called so one time in twenty."
    )
    rows = ["| curve | reference | these | p |", "|---|---|---|---|"]
    rows += [f"| {m.name} | {m.reference:.4g} | {m.new:.4g} | {m.chance:.3f} |" for m in verdict.measures]
    left_out = [f"\nNot compared, since some run lacks it: {', '.join(verdict.left_out)}."] if verdict.left_out else []
    return "\n".join([head, "", *rows, *left_out])
