"""A rollout phase: sampled groups -> shaped rewards -> advantages -> planned, scored micro-batches.

Engine-agnostic, and free of Lightning. Every rank holds the whole phase.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from aspo_lightning.advantages import AdvantageEstimator, group_advantages, has_spread
from aspo_lightning.batching import Averaging, Plan, loss_weights, plan_phase
from aspo_lightning.errors import ConfigError
from aspo_lightning.metrics import accuracy, repetition_rate
from aspo_lightning.types import MicroBatch, Rollout, RolloutGroup

Scorer = Callable[[Sequence[MicroBatch]], list[tuple[Tensor, Tensor]]]
"""(old_logprobs[N], ref_logprobs[N]) of each micro-batch, on the CPU."""

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


@dataclass(frozen=True)
class Phase:
    """What an epoch trains on, for one rank: iterating gives the micro-batches in training order."""

    epoch: int
    micro_batches: list[MicroBatch]
    accumulate: int
    """Micro-batches of an optimizer step."""
    groups: list[RolloutGroup]
    """All that were sampled, on all ranks, kept or not."""
    metrics: dict[str, float] = field(default_factory=dict)
    """By TensorBoard tag; the same on every rank."""

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)


def build_phase(
    groups: Sequence[RolloutGroup],
    scorer: Scorer,
    *,
    epoch: int,
    optimizer_steps: int,
    token_budget: int,
    max_completion_length: int,
    advantage: AdvantageEstimator = "group_std",
    averaging: Averaging = "token_mean",
    shaping: Shaping = Shaping(),
    no_spread: NoSpread = "drop",
    passes: int = 1,
    max_groups: int | None = None,
    mismatch_correction: MismatchCorrection = "off",
    mismatch_bounds: tuple[float, float] = (0.5, 2.0),
    quadratic_cost: float = 0.0,
    rank: int = 0,
    world_size: int = 1,
) -> Phase:
    """Turns sampled groups into the scored micro-batches of this rank.

    Groups without reward spread are in no numerator and no denominator of the loss, unless ``no_spread`` is keep. Of
    the others the first ``max_groups`` are trained on, ``passes`` times.
    """
    metrics = rollout_metrics(groups)
    kept = [g for g in groups if no_spread == "keep" or has_task_spread(g, shaping)][:max_groups]
    metrics["rollout/kept_groups"] = float(len(kept))
    sequences = trained_sequences(kept, advantage, shaping, max_completion_length)
    plan = plan_phase(
        [[len(s.prompt_ids) + len(s.rollout.completion_ids) for s in group] for group in sequences],
        optimizer_steps=optimizer_steps,
        world_size=world_size,
        token_budget=token_budget,
        quadratic_cost=quadratic_cost,
    )
    micro_batches = pack([s for g in sequences for s in g], plan, averaging, max_completion_length, rank, world_size)
    start = time.perf_counter()
    scored = [
        replace(batch, old_logprobs=old, ref_logprobs=ref)
        for batch, (old, ref) in zip(micro_batches, scorer(micro_batches), strict=True)
    ]
    metrics["time/score_s"] = time.perf_counter() - start
    metrics |= mismatch_metrics(scored, world_size)
    corrected = [correct_mismatch(batch, mismatch_correction, mismatch_bounds) for batch in scored]
    return Phase(epoch, corrected * passes, plan.accumulate, list(groups), metrics)


class TrainedSequence(NamedTuple):
    """A completion that is trained, with its advantage."""

    prompt_ids: tuple[int, ...]
    rollout: Rollout
    advantage: float


def trained_sequences(
    groups: Sequence[RolloutGroup], advantage: AdvantageEstimator, shaping: Shaping, max_completion_length: int
) -> list[list[TrainedSequence]]:
    """The completions of each group that go into the loss, with the advantages of their shaped rewards."""
    if not groups:
        return []
    rewards = [[shaped_reward(r, shaping, max_completion_length) for r in g.rollouts] for g in groups]
    spread = torch.tensor([has_task_spread(g, shaping) for g in groups])
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), advantage, spread=spread).tolist()
    trained = [
        [
            TrainedSequence(group.prompt.prompt_ids, rollout, value)
            for rollout, value in zip(group.rollouts, values, strict=True)
            if not (rollout.truncated and shaping.truncated == "mask")
        ]
        for group, values in zip(groups, advantages, strict=True)
    ]
    return [group for group in trained if group]


def shaped_reward(rollout: Rollout, shaping: Shaping, max_completion_length: int) -> float:
    """The task reward plus DAPO's soft overlong penalty (arXiv 2503.14476, eq. 13).

    With buffer b and limit L: 0 up to L - b tokens, falling evenly to -overlong_penalty at L. Replies of an environment
    count as they do for the limit.
    """
    reward = task_reward(rollout, shaping)
    if not shaping.overlong_buffer:
        return reward
    excess = len(rollout.completion_ids) - (max_completion_length - shaping.overlong_buffer)
    return reward - shaping.overlong_penalty * min(1.0, max(0.0, excess / shaping.overlong_buffer))


def task_reward(rollout: Rollout, shaping: Shaping) -> float:
    """The score, or 0 for a truncated completion where that is the rule."""
    return 0.0 if rollout.truncated and shaping.truncated == "zero" else rollout.reward


def has_task_spread(group: RolloutGroup, shaping: Shaping) -> bool:
    """Whether its completions differ in task reward, before the overlong penalty. Without that it tells nothing."""
    return has_spread([task_reward(r, shaping) for r in group.rollouts])


def pack(
    sequences: Sequence[TrainedSequence],
    plan: Plan,
    averaging: Averaging,
    max_completion_length: int,
    rank: int,
    world_size: int,
) -> list[MicroBatch]:
    """The micro-batches of a rank, in training order, not yet scored. One empty batch if there are no sequences."""
    if not sequences:
        return [MicroBatch.from_sequences([])]
    batches = []
    for step in plan.steps:
        members = [i for ranks in step for bin in ranks for i in bin]
        weights = dict(
            zip(
                members,
                loss_weights(
                    [sequences[i].rollout.sampled_length for i in members],
                    averaging,
                    scale=plan.accumulate * world_size,
                    max_completion_length=max_completion_length,
                ),
                strict=True,
            )
        )
        batches += [
            MicroBatch.from_sequences(
                [(sequences[i].prompt_ids, sequences[i].rollout.completion_ids) for i in bin],
                sampled=[sequences[i].rollout.sampled for i in bin],
                advantages=[sequences[i].advantage for i in bin],
                loss_weights=[weights[i] for i in bin],
                generator_logprobs=[sequences[i].rollout.generator_logprobs for i in bin],
            )
            for bin in step[rank]
        ]
    return batches


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over all completions of a phase; length in tokens."""
    rollouts = [r for g in groups for r in g.rollouts]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    return {
        "rollout/reward": mean([r.reward for r in rollouts]),
        "rollout/accuracy": accuracy(groups),
        "rollout/length": mean([r.sampled_length for r in rollouts]),
        "rollout/truncated_fraction": mean([r.truncated for r in rollouts]),
        "rollout/repetition_rate": mean([repetition_rate(r.text) for r in rollouts]),
        "rollout/failed_rewards": float(sum(r.failed for r in rollouts)),
    }


def mismatch_metrics(batches: Sequence[MicroBatch], world_size: int = 1) -> dict[str, float]:
    """|old - generator log-prob| over all response tokens of all ranks: how far engine and trainer are apart."""
    difference = torch.cat([(b.old_logprobs - b.generator_logprobs).abs().double() for b in batches])
    sums = [difference.sum().item(), float(difference.numel()), difference.max().item() if len(difference) else 0.0]
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        dist.all_gather_object(shares, sums)
        sums = [sum(s[0] for s in shares), sum(s[1] for s in shares), max(s[2] for s in shares)]
    return {"mismatch/logprob_abs_mean": sums[0] / max(1.0, sums[1]), "mismatch/logprob_abs_max": sums[2]}


def correct_mismatch(batch: MicroBatch, correction: MismatchCorrection, bounds: tuple[float, float]) -> MicroBatch:
    """Weighs the advantages by c = pi_old / pi_generator, which stays the same for all updates of a phase.

    - ``truncate``: min(c, upper bound) (TIS, truncated importance sampling).
    - ``mask``: c inside the bounds, 0 outside (IcePop).
    """
    if correction == "off":
        return batch
    low, high = bounds
    ratio = (batch.old_logprobs - batch.generator_logprobs).clamp(-20, 20).exp()
    weight = ratio.clamp(max=high) if correction == "truncate" else ratio * ((ratio >= low) & (ratio <= high))
    return replace(batch, advantages=batch.advantages * weight)


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
