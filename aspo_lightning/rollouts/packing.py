"""Planning a phase: groups -> optimizer steps x micro-batches x ranks, balanced; rows, and the weights of the loss."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from aspo_lightning.errors import ConfigError
from aspo_lightning.rollouts.settings import Averaging
from aspo_lightning.rollouts.shaping import TrainedSequence
from aspo_lightning.types import MicroBatch


class Plan(NamedTuple):
    """Which sequences go where.

    ``steps[s][rank][j]`` lists the sequences of micro-batch j of optimizer step s on a rank. Every step and rank has
    ``accumulate`` micro-batches; one may be empty where there are fewer sequences than places.
    """

    steps: list[list[list[list[int]]]]
    accumulate: int


def plan_phase(
    groups: Sequence[Sequence[int]],
    *,
    optimizer_steps: int,
    world_size: int = 1,
    token_budget: int,
    quadratic_cost: float = 0.0,
) -> Plan:
    """Shares out the sequences of a phase.

    Groups stay together in an optimizer step, in the order given, as evenly as their number allows; fewer groups than
    ``optimizer_steps`` make fewer steps. In each step the sequences are packed into ``accumulate`` x ``world_size``
    micro-batches of at most ``token_budget`` tokens and nearly equal cost; ``accumulate`` is the smallest number that
    fits in every step. The same input gives the same plan.

    Args:
        groups: for each group the lengths in tokens of its sequences. Sequences are numbered through all groups.
        optimizer_steps: how many updates the phase is for.
        world_size: ranks that train.
        token_budget: the most tokens a micro-batch may have.
        quadratic_cost: a sequence of n tokens costs n + quadratic_cost * n^2; for attention in a transformer of hidden
            size H that is about 1 / (6 H).

    Raises:
        ConfigError: if a sequence is longer than the budget.
    """
    lengths = [length for group in groups for length in group]
    if lengths and max(lengths) > token_budget:
        raise ConfigError(
            f"A sequence has {max(lengths)} tokens, more than token_budget {token_budget}. "
            f"Set data.token_budget to at least {max(lengths)}."
        )
    costs = [n + quadratic_cost * n * n for n in lengths]
    members, start = [], 0
    for group in groups:
        members.append(range(start, start + len(group)))
        start += len(group)
    count = min(optimizer_steps, len(groups))
    steps = [
        [i for group in members[s * len(groups) // count : (s + 1) * len(groups) // count] for i in group]
        for s in range(count)
    ]
    accumulate = max([1, *(-(-sum(lengths[i] for i in step) // (token_budget * world_size)) for step in steps)])
    while True:
        packed = [_pack(step, lengths, costs, accumulate * world_size, token_budget) for step in steps]
        if all(bins is not None for bins in packed):
            break
        accumulate += 1
    return Plan([_deal(bins, world_size) for bins in packed if bins], accumulate)


def _deal(bins: list[list[int]], world_size: int) -> list[list[list[int]]]:
    """Bins by falling cost to ranks: those that wait for each other at a micro-batch get neighbours, in snake order."""
    rows = [bins[j : j + world_size] for j in range(0, len(bins), world_size)]
    return [[row[rank if j % 2 == 0 else -1 - rank] for j, row in enumerate(rows)] for rank in range(world_size)]


def _pack(
    step: Sequence[int], lengths: Sequence[int], costs: Sequence[float], bins: int, token_budget: int
) -> list[list[int]] | None:
    """Heaviest first into the lightest bin that has room; bins by falling cost. None if something finds no room."""
    heap = [(0.0, b, 0) for b in range(bins)]  # (cost, bin, tokens)
    content: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(step, key=lambda i: (-costs[i], i)):
        full = []
        while heap and heap[0][2] + lengths[i] > token_budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, b, tokens = heapq.heappop(heap)
        content[b].append(i)
        heapq.heappush(heap, (cost + costs[i], b, tokens + lengths[i]))
        for entry in full:
            heapq.heappush(heap, entry)
    order = sorted(range(bins), key=lambda b: (-sum(costs[i] for i in content[b]), b))
    return [sorted(content[b]) for b in order]


def loss_weights(
    completion_lengths: Sequence[int],
    averaging: Averaging,
    *,
    scale: float,
    max_completion_length: int,
) -> list[float]:
    """The loss weight of the tokens of each sequence of one optimizer step, over all its micro-batches and ranks.

    - ``token_mean``: 1 / (tokens of the step), as the paper does.
    - ``sequence_mean``: 1 / (sequences x own length): the mean of per-sequence means (GRPO as first published).
    - ``sequence_sum``: 1 / (sequences x max_completion_length): no length bias (Dr. GRPO, arXiv 2503.20783).

    Args:
        completion_lengths: response tokens of every sequence of the step.
        scale: accumulate x world_size. Lightning divides by the first and averages gradients over the second; this
            takes both back, so that the gradient doesn't depend on either.
    """
    sequences = max(1, sum(n > 0 for n in completion_lengths))
    if averaging == "token_mean":
        return [scale / max(1, sum(completion_lengths))] * len(completion_lengths)
    if averaging == "sequence_mean":
        return [scale / (sequences * max(1, n)) for n in completion_lengths]
    return [scale / (sequences * max_completion_length)] * len(completion_lengths)


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
