"""A rollout phase: prompts -> completions -> rewards -> advantages -> planned, scored micro-batches.

Engine-agnostic, and free of Lightning. Every rank samples its share, then holds the whole phase.
"""

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm.auto import tqdm

from aspo_lightning.advantages import AdvantageEstimator, group_advantages, has_spread
from aspo_lightning.batching import Averaging, Plan, loss_weights, plan_phase
from aspo_lightning.engines.base import Generator, SamplingRequest
from aspo_lightning.errors import ConfigError
from aspo_lightning.metrics import pass_at_k, repetition_rate
from aspo_lightning.rewards import RewardItem, RewardPool
from aspo_lightning.types import MicroBatch, Prompt, Rollout, RolloutGroup

SOLVED = 1.0 - 1e-6  # a task reward from here on is a full solution

Scorer = Callable[[MicroBatch], tuple[Tensor, Tensor]]
"""(old_logprobs[N], ref_logprobs[N]) of a micro-batch, on the CPU."""

MismatchCorrection = Literal["off", "truncate", "mask"]


class Sampling(NamedTuple):
    """How completions are drawn."""

    group_size: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


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


def sampling_seed(seed: int, epoch: int, prompt_id: str, sample: int) -> int:
    """f(run seed, epoch, prompt, sample): siblings differ, and a resumed run draws the same again. 0 to 2^63 - 1."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{prompt_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_prompts(prompts: Sequence[Prompt], *, count: int, epoch: int, seed: int) -> list[Prompt]:
    """The prompts of an epoch: a function of (seed, epoch), going through all of them in a new order each pass."""
    per_pass = len(prompts) // count  # whole phases; the rest of a pass has its turn in another order
    number, position = divmod(epoch, per_pass)
    order = list(range(len(prompts)))
    random.Random(f"{seed}/{number}").shuffle(order)
    return [prompts[i] for i in order[position * count : (position + 1) * count]]


def sample_groups(
    engine: Generator,
    pool: RewardPool,
    decode: Callable[[Sequence[int]], str],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    description: str = "generate",
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """Samples and scores a group for each prompt: each rank its share, the result gathered on all.

    Returns:
        The groups in the order of the prompts, and the seconds of generation and reward (of the slowest rank).
    """
    share = prompts[rank::world_size]
    start = time.perf_counter()
    completions = engine.generate(
        [
            SamplingRequest(
                prompt.prompt_ids,
                sampling.max_tokens,
                sampling_seed(sampling.seed, epoch, prompt.id, sample),
                sampling.temperature,
                sampling.top_p,
            )
            for prompt in share
            for sample in range(sampling.group_size)
        ],
        description=description,
    )
    generated = time.perf_counter()
    texts = [decode(c.completion_ids) for c in completions]
    owners = [prompt for prompt in share for _ in range(sampling.group_size)]
    scores = pool.score([RewardItem(p.reward, text, p.row) for p, text in zip(owners, texts, strict=True)])
    rollouts = [
        Rollout(c.completion_ids, c.generator_logprobs, c.truncated, text, score.reward, score.failed)
        for c, text, score in zip(completions, texts, scores, strict=True)
    ]
    groups = [
        RolloutGroup(prompt, tuple(rollouts[i * sampling.group_size : (i + 1) * sampling.group_size]))
        for i, prompt in enumerate(share)
    ]
    times = {"time/generate_s": generated - start, "time/reward_s": time.perf_counter() - generated}
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        dist.all_gather_object(shares, (groups, times))
        groups = [shares[i % world_size][0][i // world_size] for i in range(len(prompts))]
        times = {key: max(t[key] for _, t in shares) for key in times}
    return groups, times


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
    mismatch_correction: MismatchCorrection = "off",
    mismatch_bounds: tuple[float, float] = (0.5, 2.0),
    quadratic_cost: float = 0.0,
    rank: int = 0,
    world_size: int = 1,
) -> Phase:
    """Turns sampled groups into the scored micro-batches of this rank.

    Groups without reward spread are dropped: they are in no numerator and no denominator of the loss.
    """
    kept = [g for g in groups if has_spread(torch.tensor([[r.reward for r in g.rollouts]], dtype=torch.float64))[0]]
    metrics = rollout_metrics(groups)
    metrics["rollout/kept_groups"] = float(len(kept))
    plan = plan_phase(
        [[len(g.prompt.prompt_ids) + len(r.completion_ids) for r in g.rollouts] for g in kept],
        optimizer_steps=optimizer_steps,
        world_size=world_size,
        token_budget=token_budget,
        quadratic_cost=quadratic_cost,
    )
    micro_batches = pack(kept, plan, advantage, averaging, max_completion_length, rank, world_size)
    start = time.perf_counter()
    scored = []
    for batch in tqdm(micro_batches, desc="score", leave=False, disable=None):
        old, ref = scorer(batch)
        scored.append(replace(batch, old_logprobs=old, ref_logprobs=ref))
    metrics["time/score_s"] = time.perf_counter() - start
    metrics |= mismatch_metrics(scored, world_size)
    corrected = [correct_mismatch(batch, mismatch_correction, mismatch_bounds) for batch in scored]
    return Phase(epoch, corrected, plan.accumulate, list(groups), metrics)


def pack(
    groups: Sequence[RolloutGroup],
    plan: Plan,
    advantage: AdvantageEstimator,
    averaging: Averaging,
    max_completion_length: int,
    rank: int,
    world_size: int,
) -> list[MicroBatch]:
    """The micro-batches of a rank, in training order, not yet scored. One empty batch if there are no groups."""
    if not groups:
        return [MicroBatch.from_sequences([])]
    rewards = torch.tensor([[r.reward for r in g.rollouts] for g in groups], dtype=torch.float64)
    advantages = group_advantages(rewards, advantage).flatten().tolist()
    sequences = [(g.prompt.prompt_ids, r) for g in groups for r in g.rollouts]
    batches = []
    for step in plan.steps:
        members = [i for ranks in step for bin in ranks for i in bin]
        weights = dict(
            zip(
                members,
                loss_weights(
                    [len(sequences[i][1].completion_ids) for i in members],
                    averaging,
                    scale=plan.accumulate * world_size,
                    max_completion_length=max_completion_length,
                ),
                strict=True,
            )
        )
        batches += [
            MicroBatch.from_sequences(
                [(sequences[i][0], sequences[i][1].completion_ids) for i in bin],
                advantages=[advantages[i] for i in bin],
                loss_weights=[weights[i] for i in bin],
                generator_logprobs=[sequences[i][1].generator_logprobs for i in bin],
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
        "rollout/accuracy": mean([r.reward >= SOLVED for r in rollouts]),
        "rollout/length": mean([len(r.completion_ids) for r in rollouts]),
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


def held_out(prompts: Sequence[Prompt], evaluations: Iterable[Sequence[Prompt]]) -> list[Prompt]:
    """The prompts that are in none of the evaluations, compared by their tokens."""
    taken = {p.prompt_ids for evaluation in evaluations for p in evaluation}
    return [p for p in prompts if p.prompt_ids not in taken]


def evaluation_metrics(groups: Sequence[RolloutGroup], tag: str) -> dict[str, float]:
    """avg@k and pass@k over problems, k being the completions of each; a completion solves with a full reward."""
    k = len(groups[0].rollouts)
    solved = [sum(r.reward >= SOLVED for r in g.rollouts) for g in groups]
    metrics = {f"{tag}/avg@{k}": sum(solved) / (k * len(groups))}
    if k > 1:
        metrics[f"{tag}/pass@{k}"] = math.fsum(pass_at_k(k, s, k) for s in solved) / len(groups)
    return metrics
