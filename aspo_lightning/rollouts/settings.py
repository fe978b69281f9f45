"""The settings of rollouts, ``data.*`` on the command line: each is documented and checked where it is defined.

A new one takes two edits: its field here, and the code that reads it. ``INCIDENTAL`` marks those that change no number.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from aspo_lightning.advantages import Advantage, GroupStd
from aspo_lightning.errors import ConfigError
from aspo_lightning.identity import INCIDENTAL
from aspo_lightning.rollouts.corrections import Correction

Averaging = Literal["token_mean", "sequence_mean", "sequence_sum"]
NoSpread = Literal["drop", "keep", "refill"]
TruncatedRule = Literal["score", "zero", "mask"]


class Sampling(NamedTuple):
    """How completions are drawn."""

    group_size: int
    max_tokens: int
    """The most tokens of a completion, all its turns and their replies together."""
    temperature: float
    top_p: float
    seed: int

    def check(self, size_name: str, prefix: str) -> None:
        """Raises ConfigError for settings no completion can be drawn with, or that draw siblings all alike."""
        if self.group_size < 1:
            raise ConfigError(f"{size_name} is {self.group_size}; it must be at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"{prefix}temperature is {self.temperature}; it must be finite and at least 0 (0: greedy)."
            )
        if self.temperature == 0 and self.group_size > 1:
            raise ConfigError(
                f"{prefix}temperature is 0 (greedy) with {size_name} {self.group_size}: all completions of a group "
                f"would be the same. Set {prefix}temperature above 0 (the paper samples at 1.0)."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"{prefix}top_p is {self.top_p}; it must be above 0 and at most 1.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A part of the settings. A class that joins several checks each of them, and itself last."""

    def __post_init__(self) -> None:
        for part in reversed(type(self).__mro__):
            if "check" in vars(part):
                vars(part)["check"](self)


@dataclass(frozen=True, kw_only=True)
class PhaseSettings(Settings):
    """The size of a phase, and how it is trained on."""

    prompts_per_phase: int = 64
    """Prompts of an epoch."""
    optimizer_steps: int | None = 4
    """Updates of a pass through the phase; the kept groups are shared among them. None: ``groups_per_step`` says."""
    groups_per_step: int | None = None
    """Groups of an update, in place of ``optimizer_steps``: a pass has as many updates as the kept groups fill, and the
    last, if it isn't full, counts by its size (the released script of the paper: 16)."""
    passes: int = 1
    """How often an epoch goes through its phase (1; the released script of the paper: 3)."""
    no_spread: NoSpread = "drop"
    """Groups whose completions all have one reward are dropped (the released script), kept (their zeros count in the
    average), or replaced by sampling more prompts (refill: DAPO's dynamic sampling)."""
    max_refills: int = 3
    """How many more times refill may sample in an epoch."""
    lag: int = 0
    """By how many epochs the weights that sample a phase are older than those that it trains. With 1 or more, servers
    (``data.engine: VLLMServers``) sample while the epochs before train. 0: on policy."""

    def updates(self, groups: int) -> int:
        """Optimizer steps of a pass through so many groups."""
        if self.optimizer_steps is not None:
            return min(self.optimizer_steps, groups)
        assert self.groups_per_step is not None
        return -(-groups // self.groups_per_step)

    @property
    def refills(self) -> int:
        """How many more times an epoch may sample."""
        return self.max_refills if self.no_spread == "refill" else 0

    def check(self) -> None:
        for name in ("prompts_per_phase", "optimizer_steps", "groups_per_step", "passes"):
            if (value := getattr(self, name)) is not None:
                at_least(1, f"data.{name}", value)
        if (self.optimizer_steps is None) == (self.groups_per_step is None):
            raise ConfigError(
                f"data.optimizer_steps is {self.optimizer_steps} and data.groups_per_step {self.groups_per_step}. Give "
                "one of them, and null for the other."
            )
        at_least(0, "data.max_refills", self.max_refills)
        at_least(0, "data.lag", self.lag)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """How completions are sampled."""

    group_size: int = 16
    """Completions of each prompt, compared with each other."""
    max_prompt_length: int = 2048
    """The most tokens of a prompt; longer ones are dropped."""
    max_completion_length: int = 8192
    """The most tokens of a completion; a longer one is cut off there."""
    temperature: float = 1.0
    """Temperature of sampling; the trainer divides its logits by the same."""
    top_p: float = 1.0
    """Nucleus (top-p) of sampling. Below 1 there is no mismatch correction: the engine's log-probs are then of the
    nucleus, the trainer's of all tokens."""
    repetition_ngram: Annotated[int, INCIDENTAL] = 20
    """Words of the n-grams of which ``repetition_rate`` is the repeated share (20: the paper's script)."""
    seed: int = 0
    """Seed of prompts and sampling (set by ``seed_everything`` on the command line)."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.group_size, self.max_completion_length, self.temperature, self.top_p, self.seed)

    @property
    def longest_sequence(self) -> int:
        """Tokens of a prompt and its completion."""
        return self.max_prompt_length + self.max_completion_length

    def check(self) -> None:
        self.sampling.check("data.group_size", "data.")
        if self.group_size < 2:
            raise ConfigError(
                f"data.group_size is {self.group_size}; completions are judged against each other, so it must be at "
                "least 2."
            )
        for name in ("max_prompt_length", "max_completion_length", "repetition_ngram"):
            at_least(1, f"data.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RewardSettings(Settings):
    """How completions are scored, and what becomes of a score before it turns into an advantage."""

    truncated: TruncatedRule = "score"
    """A completion that ran into the length limit gets its score, zero, or is left out of the loss (mask), but not of
    its group's mean."""
    overlong_buffer: int = 0
    """Tokens before max_completion_length over which a penalty rises (DAPO). 0: none."""
    overlong_penalty: float = 1.0
    """That penalty at full length."""
    spread: Literal["task", "shaped"] = "task"
    """The reward by which a group has spread or not: of the task, or shaped, with the overlong penalty (the released
    script): there a group that is all wrong is kept if some of it is too long."""
    advantage: Advantage = GroupStd()  # noqa: RUF009 (frozen)
    """What a reward becomes, by class name: GroupStd (GRPO), GroupMean (Dr. GRPO), LeaveOneOut (RLOO), BatchStd
    (REINFORCE++ baseline), LitePPO, MaxRL, OPO."""
    reward_workers: Annotated[int, INCIDENTAL] = 2
    """Processes that score completions, on each rank."""
    reward_timeout_s: float = 5.0
    """Wall-clock limit of one score."""

    def check(self) -> None:
        if not 0 <= self.overlong_penalty < math.inf:
            raise ConfigError(f"data.overlong_penalty is {self.overlong_penalty}; it must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """How tokens are packed and averaged."""

    token_budget: Annotated[int | None, INCIDENTAL] = None
    """The most tokens of a micro-batch; bounds the trainer's memory. None: one longest sequence."""
    averaging: Averaging = "token_mean"
    """token_mean (the paper's), sequence_mean (GRPO), sequence_sum (Dr. GRPO)."""


@dataclass(frozen=True, kw_only=True)
class MismatchSettings(Settings):
    """What is done about the engine's log-probs not being the trainer's."""

    mismatch: Correction | None = None
    """How tokens are weighed for it, by class name: TruncatedRatio (TIS), MaskedRatio (IcePop), Bypass. None: it is
    only measured."""
    probe_factor: Annotated[float | None, INCIDENTAL] = 20.0
    """How much further apart engine and trainer may get, on a probe after each sync, than they are at first. None: no
    probe."""

    def check(self) -> None:
        if self.probe_factor is not None and not 1 <= self.probe_factor < math.inf:
            raise ConfigError(
                f"data.probe_factor is {self.probe_factor}; it must be finite and at least 1, or null (no probe)."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """How held-out tasks are sampled."""

    eval_group_size: Annotated[int | dict[str, int], INCIDENTAL] = 1
    """Completions of each held-out prompt: k of avg@k; a number, or one for each task of ``val``."""
    eval_k: Annotated[list[int] | None, INCIDENTAL] = None
    """Further k, up to that number, to report pass@k and maj@k for."""
    eval_temperature: Annotated[float, INCIDENTAL] = 0.8
    """Temperature of sampling in evaluations; 0 is greedy."""
    eval_top_p: Annotated[float, INCIDENTAL] = 1.0
    """Nucleus (top-p) of sampling in evaluations."""
    eval_max_completion_length: Annotated[int | None, INCIDENTAL] = None
    """Tokens in evaluations. None: max_completion_length."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(
    PhaseSettings, SamplingSettings, RewardSettings, LossSettings, MismatchSettings, EvaluationSettings
):
    """All of them."""

    @property
    def micro_batch_tokens(self) -> int:
        """The most tokens of a micro-batch."""
        return self.longest_sequence if self.token_budget is None else self.token_budget

    @property
    def eval_length(self) -> int:
        """The most tokens of a completion in evaluations."""
        limit = self.eval_max_completion_length
        return self.max_completion_length if limit is None else limit

    def evaluations(self, tasks: Iterable[str]) -> dict[str, Sampling]:
        """How each held-out task is sampled.

        Raises:
            ConfigError: unless each has its number of completions, and ``eval_k`` is within it.
        """
        sizes = self._sizes(list(tasks))
        found = {
            name: Sampling(size, self.eval_length, self.eval_temperature, self.eval_top_p, self.seed)
            for name, size in sizes.items()
        }
        for name, sampling in found.items():
            sampling.check(f"data.eval_group_size of {name}", "data.eval_")
            if wrong := [k for k in self.eval_k or [] if not 1 <= k <= sampling.group_size]:
                raise ConfigError(
                    f"data.eval_k has {wrong[0]}, but {name} is sampled {sampling.group_size} times a problem. Allowed "
                    f"are 1 to {sampling.group_size}; raise data.eval_group_size for more."
                )
        return found

    def _sizes(self, tasks: list[str]) -> dict[str, int]:
        size = self.eval_group_size
        if isinstance(size, int):
            return dict.fromkeys(tasks, size)
        if set(size) != set(tasks):
            raise ConfigError(
                f"data.eval_group_size is given for {', '.join(size)}, but the tasks of data.val are "
                f"{', '.join(tasks)}. Give a number for each, or one for all."
            )
        return {name: size[name] for name in tasks}

    def check(self) -> None:
        at_least(1, "data.eval_max_completion_length", self.eval_length)
        if self.micro_batch_tokens < self.longest_sequence:
            raise ConfigError(
                f"data.token_budget is {self.token_budget}, less than the longest sequence: max_prompt_length "
                f"{self.max_prompt_length} + max_completion_length {self.max_completion_length} = "
                f"{self.longest_sequence}. Raise it."
            )
        if self.mismatch is not None and self.top_p < 1:
            raise ConfigError(
                f"data.mismatch is {type(self.mismatch).__name__} and data.top_p {self.top_p}: the engine's log-probs "
                "are then of the nucleus and the trainer's of all tokens, so their ratio corrects nothing. Set top_p "
                "to 1, or mismatch to null."
            )
        if not 0 <= self.overlong_buffer <= self.max_completion_length:
            raise ConfigError(
                f"data.overlong_buffer is {self.overlong_buffer}; it must be from 0 (no penalty) to "
                f"max_completion_length {self.max_completion_length}."
            )


def at_least(least: int, name: str, value: int) -> None:
    """Raises ConfigError for a smaller value."""
    if value < least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}.")


def check_phase(prompts: int, settings: PhaseSettings) -> None:
    """Raises ConfigError unless the task can fill a phase and the phase its optimizer steps."""
    if prompts < settings.prompts_per_phase:
        raise ConfigError(
            f"The training task has {prompts} prompts, fewer than data.prompts_per_phase {settings.prompts_per_phase}. "
            "Give it more, or lower prompts_per_phase."
        )
    for name, why in (
        ("optimizer_steps", "each step needs at least one group"),
        ("groups_per_step", "no step would be full"),
    ):
        if (value := getattr(settings, name)) is not None and value > settings.prompts_per_phase:
            raise ConfigError(
                f"data.{name} is {value}, more than data.prompts_per_phase {settings.prompts_per_phase}; {why}."
            )
