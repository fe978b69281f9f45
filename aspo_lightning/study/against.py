"""Whether new runs are like those of a reference: a verdict with a known rate of false alarms."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aspo_lightning.errors import ConfigError
from aspo_lightning.markdown import markdown_table
from aspo_lightning.study import statistics
from aspo_lightning.study.table import RunCurves, epochs_of

LEVEL = 0.05
"""How often runs of the same code are called different, on average over references and runs."""

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
    """Tags of which some run has no finite value: only how many they have is compared."""
    unknown: list[str]
    """Tags that no run of the reference has, as it was made before they were logged. They aren't compared."""


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
    every, others = _tags(reference), _tags(new)
    tags = [tag for tag in every if all(_finite(run, tag) for run in (*reference, *new))]
    if not tags:
        raise ConfigError("The runs have no curve in common with the reference.")
    # A run may lack a curve, or have NaN where a step was skipped: how many values it has is a measure as well.
    values = [
        np.array(
            [
                [f(_finite(run, tag)) for tag in tags for f in (np.mean, _end)]
                + [len(_finite(run, tag)) for tag in every]
                for run in runs
            ]
        )
        for runs in (reference, new)
    ]
    chances = statistics.permutation_test(*values)
    names = [f"{tag}, {part}" for tag in tags for part in ("whole", "end")]
    names += [f"{tag}, finite values" for tag in every]
    measures = [
        Compared(name, float(a), float(b), float(p))
        for name, a, b, p in zip(names, values[0].mean(0), values[1].mean(0), chances, strict=True)
    ]
    return Verdict(
        min(m.chance for m in measures) > LEVEL,
        sorted(measures, key=lambda m: m.chance),
        [tag for tag in every if tag not in tags],
        [tag for tag in others if tag not in every],
    )


def _tags(runs: Sequence[RunCurves]) -> list[str]:
    return sorted({tag for curves in runs for tag in curves if not tag.startswith(ROUNDING)})


def _finite(run: RunCurves, tag: str) -> list[float]:
    """The values of a curve in the order of their epochs, without those that aren't finite."""
    return [value for _, value in sorted(run.get(tag, {}).items()) if math.isfinite(value)]


def _end(values: Sequence[float]) -> float:
    return float(np.mean(values[-max(1, round(LAST_PART * len(values))) :]))


def _list(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths))


def describe(verdict: Verdict, name: str, reference: int, new: int) -> str:
    """The verdict in words, with a table of what was compared."""
    differ = [m for m in verdict.measures if m.chance <= LEVEL]
    head = (
        f"Same as {name} ({new} runs against {reference}): no curve differs."
        if verdict.same
        else f"Different from {name} ({new} runs against {reference}): {len(differ)} of {len(verdict.measures)} "
        "measures differ. On average over references that is said of the same code one time in twenty: confirm it with "
        "other seeds."
    )
    rows = [[m.name, f"{m.reference:.4g}", f"{m.new:.4g}", f"{m.chance:.3f}"] for m in verdict.measures]
    left_out = (
        [f"\nSome run lacks it, so that only the number of its values is compared: {', '.join(verdict.left_out)}."]
        if verdict.left_out
        else []
    )
    unknown = [f"\nThe reference has no {', '.join(verdict.unknown)}."] if verdict.unknown else []
    return "\n".join([head, "", markdown_table(["curve", "reference", "these", "p"], rows), *left_out, *unknown])
