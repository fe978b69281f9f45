"""The settings of a phase, and what they must fulfil."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from aspo_lightning.errors import ConfigError

Averaging = Literal["token_mean", "sequence_mean", "sequence_sum"]

MismatchCorrection = Literal["off", "truncate", "mask"]

NoSpread = Literal["drop", "keep", "refill"]

TruncatedRule = Literal["score", "zero", "mask"]


class Shaping(NamedTuple):
    """What becomes of a task reward before it turns into an advantage."""

    truncated: TruncatedRule = "score"
    """A truncated completion gets its score or zero, or is left out of the loss (but not of its group's mean)."""
    overlong_buffer: int = 0
    """Length in tokens of the soft overlong penalty's slope, before max_completion_length; 0 is no penalty."""
    overlong_penalty: float = 1.0
    """At full length."""


def check_phase(prompts: int, prompts_per_phase: int, optimizer_steps: int) -> None:
    """Raises ConfigError unless the task can fill a phase and the phase its optimizer steps."""
    if prompts < prompts_per_phase:
        raise ConfigError(
            f"The training task has {prompts} prompts, fewer than data.prompts_per_phase {prompts_per_phase}. "
            "Give it more, or lower prompts_per_phase."
        )
    if optimizer_steps > prompts_per_phase:
        raise ConfigError(
            f"data.optimizer_steps is {optimizer_steps}, more than data.prompts_per_phase {prompts_per_phase}; each "
            "step needs at least one group."
        )


class Sampling(NamedTuple):
    """How completions are drawn."""

    group_size: int
    max_tokens: int
    """Of a completion; of all its turns and their replies together."""
    temperature: float
    top_p: float
    seed: int


def sizes_by_task(size: int | dict[str, int], tasks: Iterable[str]) -> dict[str, int]:
    """The number of completions by task. Raises ConfigError unless each has one."""
    if isinstance(size, int):
        return dict.fromkeys(tasks, size)
    if set(size) != set(tasks):
        raise ConfigError(
            f"data.eval_group_size is given for {', '.join(size)}, but the tasks of data.val are {', '.join(tasks)}. "
            "Give a number for each, or one for all."
        )
    return {name: size[name] for name in tasks}


def check_sampling(sampling: Sampling, size_name: str, prefix: str) -> None:
    """Raises ConfigError for settings no completion can be drawn with, or that draw siblings all alike."""
    if sampling.group_size < 1:
        raise ConfigError(f"{size_name} is {sampling.group_size}; it must be at least 1.")
    if not 0 <= sampling.temperature < math.inf:
        raise ConfigError(f"{prefix}temperature is {sampling.temperature}; it is >= 0 (0 is greedy).")
    if sampling.temperature == 0 and sampling.group_size > 1:
        raise ConfigError(
            f"{prefix}temperature is 0 (greedy) with {size_name} {sampling.group_size}: all completions of a group "
            f"would be the same. Set {prefix}temperature above 0 (the paper samples at 1.0)."
        )
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"{prefix}top_p is {sampling.top_p}; allowed are numbers above 0, up to 1.")
