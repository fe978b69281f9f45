"""The curves of a run, as it logged them to TensorBoard."""

import bisect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aspo_lightning.errors import ConfigError

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""(optimizer step, value) by TensorBoard tag."""

BEFORE = -1
"""The epoch of an evaluation before the first."""


def read_run(folder: Path) -> Curves:
    """All curves of a run.

    Raises:
        ConfigError: if the folder holds no run.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(folder.glob("events.out.tfevents.*")):
        raise ConfigError(f"{folder} holds no TensorBoard events. Give a run's folder, like runs/quickstart/version_0.")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def epoch_of_step(curves: Curves) -> Callable[[int], int]:
    """Which epoch an optimizer step belongs to. The run must have logged some epoch."""
    began = dict(sorted(curves["epoch"]))
    steps = list(began)
    return lambda step: int(began[steps[max(0, bisect.bisect_right(steps, step) - 1)]])


def by_epoch(curves: Curves) -> dict[str, dict[int, float]]:
    """Values by tag and epoch. Of an epoch that was logged again, after a resume, the last value counts."""
    if "epoch" not in curves:
        return {}
    epoch_of = epoch_of_step(curves)
    found: dict[str, dict[int, float]] = {}
    for tag, points in curves.items():
        found[tag] = {epoch_of(step): value for step, value in points}
        if tag.startswith("eval/") and points[0][0] == 0:
            # An epoch of one step has step 0 as well: it is there where there is a second value of that step.
            again = [value for step, value in points[1:] if step == 0]
            found[tag] = {BEFORE: points[0][1], **{epoch_of(step): value for step, value in points if step}}
            if again:
                found[tag][epoch_of(0)] = again[-1]
    return found
