"""One rollout phase, from the sync of the weights to scored micro-batches."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from aspo_lightning.advantages import AdvantageEstimator
from aspo_lightning.evaluation.metrics import accuracy, repetition_rate
from aspo_lightning.rollouts.mismatch import correct_mismatch, mismatch_metrics
from aspo_lightning.rollouts.packing import pack, plan_phase
from aspo_lightning.rollouts.settings import Averaging, MismatchCorrection, NoSpread, Shaping
from aspo_lightning.rollouts.shaping import has_task_spread, trained_sequences
from aspo_lightning.types import MicroBatch, Phase, Prompt, RolloutGroup

Scorer = Callable[[Sequence[MicroBatch]], list[tuple[Tensor, Tensor]]]
"""(old_logprobs[N], ref_logprobs[N]) of each micro-batch, on the CPU."""


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


def sample_phase(
    draw: Callable[[int, int, Sequence[RolloutGroup]], list[Prompt]],
    sample: Callable[[Sequence[Prompt]], tuple[list[RolloutGroup], dict[str, float]]],
    useful: Callable[[RolloutGroup], bool],
    count: int,
    *,
    max_refills: int = 0,
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """Samples ``count`` groups, and more of them while fewer than ``count`` are useful (DAPO's dynamic sampling).

    Args:
        draw: (attempt, prompts wanted, groups so far) -> prompts; fewer where there are no more.
        sample: prompts -> (groups, seconds by part).
        useful: whether a group can be trained on.
        max_refills: how many more times to sample.

    Returns:
        All groups, in the order sampled, and the seconds of all rounds together.
    """
    groups: list[RolloutGroup] = []
    times: dict[str, float] = {}
    for attempt in range(max_refills + 1):
        missing = count - sum(map(useful, groups))
        if missing <= 0 or not (prompts := draw(attempt, missing, groups)):
            break
        more, seconds = sample(prompts)
        groups += more
        times = {key: times.get(key, 0.0) + value for key, value in seconds.items()}
    return groups, times


class Policy(Protocol):
    """What a phase needs of the module that trains: see ``ASPOModule``."""

    model_name_or_path: str
    temperature: float

    def score(
        self, batches: Sequence[MicroBatch], without_reference: Sequence[MicroBatch] = ()
    ) -> list[tuple[Tensor, Tensor]]: ...

    def policy_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]: ...
