"""Planning a phase: groups -> optimizer steps x micro-batches x ranks, balanced; rows, and the weights of the loss."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aspo_lightning.errors import ConfigError
from aspo_lightning.rollouts.settings import Averaging
from aspo_lightning.types import MicroBatch, TrainedSequence


class Plan(NamedTuple):
    """Which sequences go where.

    ``steps[s][rank][j]`` lists the sequences of micro-batch j of optimizer step s on a rank. Every step and rank has
    ``accumulate`` micro-batches; one may be empty where there are fewer sequences than places.
    """

    steps: list[list[list[list[int]]]]
    accumulate: int
    fill: list[float] | None = None
    """How full each step is, by its groups. None: they all are."""


def plan_phase(
    groups: Sequence[tuple[int, Sequence[int]]],
    *,
    optimizer_steps: int | None,
    groups_per_step: int | None = None,
    world_size: int = 1,
    token_budget: int,
    quadratic_cost: float = 0.0,
    shared: bool = True,
) -> Plan:
    """Shares out the sequences of a phase.

    Groups stay together in an optimizer step, in the order given, as evenly as their number allows; fewer groups than
    ``optimizer_steps`` make fewer steps. With ``groups_per_step`` each step has as many, and the last what is left. In
    each step the sequences are packed into ``accumulate`` x ``world_size``
    micro-batches of at most ``token_budget`` tokens and nearly equal cost; ``accumulate`` is the smallest number that
    fits in every step. A group is divided among micro-batches, each with its prompt, only as far as that evens their
    cost or is needed to fit. The same input gives the same plan.

    Args:
        groups: of each the tokens of its prompt, and of each completion. Completions are numbered through all groups.
        optimizer_steps: how many updates the phase is for. None: ``groups_per_step`` says.
        groups_per_step: groups of an update, in place of ``optimizer_steps``.
        world_size: ranks that train.
        token_budget: the most tokens a micro-batch may have.
        quadratic_cost: a sequence of n tokens costs n + quadratic_cost * n^2; for attention in a transformer of hidden
            size H that is about 1 / (6 H).
        shared: whether a prompt counts once in a micro-batch, or with each of its completions.

    Raises:
        ConfigError: if a sequence is longer than the budget.
    """
    longest = max((prompt + max(lengths) for prompt, lengths in groups if lengths), default=0)
    if longest > token_budget:
        raise ConfigError(
            f"A sequence has {longest} tokens, more than token_budget {token_budget}. "
            f"Set data.token_budget to at least {longest}."
        )
    numbered, start = [], 0
    for prompt, lengths in groups:
        numbered.append(_Group(prompt, dict(enumerate(lengths, start)), quadratic_cost))
        start += len(lengths)
    if optimizer_steps is not None:
        count = min(optimizer_steps, len(groups))
        steps = [numbered[s * len(groups) // count : (s + 1) * len(groups) // count] for s in range(count)]
        fill = None
    else:
        assert groups_per_step is not None
        steps = [numbered[s : s + groups_per_step] for s in range(0, len(groups), groups_per_step)]
        fill = [len(step) / groups_per_step for step in steps]
    least = max((sum(part.tokens for g in step for part in g.divided(1)) for step in steps), default=0)
    accumulate = max(1, -(-least // (token_budget * world_size)))
    while True:
        packed = [_pack_step(step, accumulate, world_size, token_budget, shared) for step in steps]
        if all(bins is not None for bins in packed):
            break
        accumulate += 1
    return Plan([_deal(bins, world_size) for bins in packed if bins], accumulate, fill)


@dataclass(frozen=True)
class _Group:
    prompt: int
    """Tokens."""
    completions: dict[int, int]
    """Tokens by number."""
    quadratic_cost: float

    def cost(self, number: int | None = None) -> float:
        """Of a completion after its prompt, or of the prompt."""
        first, last = (0, self.prompt) if number is None else (self.prompt, self.prompt + self.completions[number])
        return last - first + self.quadratic_cost * (last * last - first * first)

    def divided(self, number: int) -> list["_Part"]:
        """In that many parts of nearly equal cost, or one a completion."""
        heap = [(self.cost(), 0, k) for k in range(min(number, len(self.completions)))]
        members: list[list[int]] = [[] for _ in heap]
        for i in sorted(self.completions, key=lambda i: (-self.cost(i), i)):
            cost, count, k = heap[0]
            members[k].append(i)
            heapq.heapreplace(heap, (cost + self.cost(i), count + 1, k))
        costs = {k: cost for cost, _, k in heap}
        return [
            _Part(part, self.prompt + sum(self.completions[i] for i in part), costs[k])
            for k, part in enumerate(members)
        ]


class _Part(NamedTuple):
    """Completions of a group with one copy of their prompt."""

    members: list[int]
    tokens: int
    cost: float


def _pack_step(
    groups: Sequence[_Group], accumulate: int, world_size: int, token_budget: int, shared: bool
) -> list[list[int]] | None:
    """The packing of a step that takes least time, and of those the one that divides groups least. None: nothing fits.

    Ranks wait for each other at each micro-batch, so the time is the sum of the heaviest of each round.
    """
    most = max((len(group.completions) for group in groups), default=1)
    numbers = [2**k for k in range(most.bit_length()) if 2**k < most] if shared else []
    packings = [
        packing
        for number in [*numbers, most]
        if (
            packing := _pack(
                [part for g in groups for part in g.divided(number)], accumulate * world_size, token_budget
            )
        )
    ]
    if not packings:
        return None
    return [content for _, content in min(packings, key=lambda bins: sum(cost for cost, _ in bins[::world_size]))]


def _deal(bins: list[list[int]], world_size: int) -> list[list[list[int]]]:
    """Bins by falling cost to ranks: those that wait for each other at a micro-batch get neighbours, in snake order."""
    rows = [bins[j : j + world_size] for j in range(0, len(bins), world_size)]
    return [[row[rank if j % 2 == 0 else -1 - rank] for j, row in enumerate(rows)] for rank in range(world_size)]


def _pack(parts: Sequence[_Part], bins: int, token_budget: int) -> list[tuple[float, list[int]]] | None:
    """Heaviest first into the lightest bin that has room. None if something finds no room.

    Returns:
        (cost, members) of each bin, by falling cost.
    """
    heap = [(0.0, b, 0) for b in range(bins)]  # (cost, bin, tokens)
    content: list[list[int]] = [[] for _ in range(bins)]
    costs = [0.0] * bins
    for part in sorted(parts, key=lambda part: (-part.cost, part.members)):
        full = []
        while heap and heap[0][2] + part.tokens > token_budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, b, tokens = heapq.heappop(heap)
        content[b] += part.members
        costs[b] = cost + part.cost
        heapq.heappush(heap, (costs[b], b, tokens + part.tokens))
        for entry in full:
            heapq.heappush(heap, entry)
    order = sorted(range(bins), key=lambda b: (-costs[b], b))
    return [(costs[b], sorted(content[b])) for b in order]


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
            takes both back, so that the gradient doesn't depend on either. Times how full the step is.
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
    for step, fill in zip(plan.steps, plan.fill or [1.0] * len(plan.steps), strict=True):
        members = [i for ranks in step for bin in ranks for i in bin]
        weights = dict(
            zip(
                members,
                loss_weights(
                    [sequences[i].rollout.sampled_length for i in members],
                    averaging,
                    scale=fill * plan.accumulate * world_size,
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
                members=bin,
            )
            for bin in step[rank]
        ]
    return batches
