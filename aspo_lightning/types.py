"""The data that flows through a phase, all immutable; and the words for it.

row: what a task knows of a problem, its columns by name; rewards and environments are handed it.
prompt: a problem as the model sees it, in tokens.
completion: what the engine samples after a prompt, in one turn or, with an environment, in several.
rollout: a completion with its reward.
group: the rollouts of one prompt, compared with each other.
advantage: how much better a rollout is than its group; each of its tokens has it.
phase: all that an epoch samples, and how it is trained on: optimizer steps, each of several micro-batches.
micro-batch: sequences packed into one row of tokens, without padding, for one forward and backward pass.
generator log-probs: of the sampled tokens, as the engine sampled them.
old log-probs: of the same tokens, by the trainer before the phase's first update.
policy log-probs: by the weights in training; ``log_ratio`` is policy minus old, ``ratio`` its exponential.
reference log-probs: by the frozen model that a KL penalty is measured from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

Row = dict[str, Any]
"""A row of a task: its columns by name. What they hold is the task's business and its rewards'."""
State = dict[str, Any]
"""What a part of a run keeps in a checkpoint, by name."""


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sampled from."""

    id: str
    """Unique within its task, and stable across runs: seeds and results are keyed by it."""
    prompt_ids: tuple[int, ...]
    text: str
    """What ``prompt_ids`` decode to, chat template included."""
    question: str
    """The problem itself, before any template: by it a problem is recognized in another task."""
    rewards: Mapping[str, float]
    """Import paths of the functions that judge a completion, ``reward(completion: str, row: dict) -> float``, and
    their weights."""
    row: Row
    """The task's own row, handed to the rewards."""
    level: int = 0
    """How hard it is, for a curriculum of levels."""
    environment: str | None = None
    """Import path of what replies to the model's turns, see ``tasks.Task``."""
    before_reply: str = ""
    """Goes between a turn and the environment's reply."""
    after_reply: str = ""
    """Goes between the reply and the next turn."""

    def renamed(self, id: str) -> "Prompt":
        """The same problem under another id."""
        return replace(self, id=id)


@dataclass(frozen=True)
class Completion:
    """What an engine sampled."""

    completion_ids: tuple[int, ...]
    """With the end-of-sequence token, if one was sampled."""
    generator_logprobs: tuple[float, ...]
    """Log-prob of each token, under the distribution it was sampled from (temperature applied); 0 if it wasn't
    sampled."""
    truncated: bool
    """The engine ran into the length limit before an end-of-sequence token."""


@dataclass(frozen=True)
class Rollout(Completion):
    """A completion with its text and reward."""

    text: str
    reward: float
    """Task reward: the weighted sum of its rewards."""
    solved: bool
    """Whether it is a full solution, by the first of its rewards."""
    failed: bool = False
    """The reward function hung, crashed or raised; ``reward`` is then 0."""
    sampled: tuple[bool, ...] | None = None
    """Of each token, whether the model sampled it; the others are an environment's. None: all of them."""
    answer: str | None = None
    """What it answers, as text to compare others with; only where a vote is wanted, and None if it can't be known."""
    repetition_rate: float = 0.0
    """Of its text, see ``evaluation.metrics``."""
    rewards: Mapping[str, float] = field(default_factory=dict, compare=False)
    """The value of each reward function that didn't fail, by its path, before it is weighed; a journal doesn't keep
    them."""
    turns: int = 1
    """Of the model; more than one only with an environment."""

    @property
    def sampled_length(self) -> int:
        """Tokens that the model sampled: those that are trained."""
        return len(self.completion_ids) if self.sampled is None else sum(self.sampled)


class CompletionRecord(TypedDict):
    """A completion in a journal; without log-probs, which only training needs."""

    ids: list[int]
    truncated: bool
    failed: bool
    turns: NotRequired[list[str]]
    """With an environment: the text of each turn of the model."""
    sampled: NotRequired[list[bool]]
    """With an environment: of each token, whether the model sampled it."""


class Known(TypedDict, total=False):
    """What a journal knows of a completion: first the completion, then its rewards."""

    completion: CompletionRecord
    reward: float
    solved: bool
    failed: bool
    answer: str | None


@dataclass(frozen=True)
class RolloutGroup:
    """The completions of one prompt, compared with each other."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


class TrainedSequence(NamedTuple):
    """A completion that is trained, with its advantage."""

    prompt_ids: tuple[int, ...]
    rollout: Rollout
    advantage: float


@dataclass(frozen=True)
class Evaluation:
    """The groups sampled for one benchmark, and what they measure."""

    groups: list[RolloutGroup]
    metrics: dict[str, float]
    """By TensorBoard tag."""

    def to(self, device: torch.device | str) -> "Evaluation":
        """Itself: there is nothing to compute on a device."""
        return self


@dataclass(frozen=True)
class MicroBatch:
    """A packed row of T tokens with N response tokens; all fields from ``response_index`` on are flat over these N.

    A prompt stands in it once, and the completions that share it follow. Each of them sees the prompt and itself.
    """

    input_ids: Tensor
    """[T]; each completion without its last token, from which nothing is predicted."""
    position_ids: Tensor
    """[T]; from 0 with each prompt; each of its completions continues from the prompt's end."""
    members: tuple[int, ...]
    """Which of the phase's trained sequences the responses are, by their number there."""
    row_lengths: tuple[tuple[int, ...], ...]
    """Of each prompt in the row: its tokens, then those of each completion; T together."""
    response_index: Tensor
    """[N]; where in the row the token before each response token is: its hidden state predicts it. The first tokens of
    completions that share a prompt have the same one, the prompt's end."""
    targets: Tensor
    """[N]; the response tokens."""
    sequence_index: Tensor
    """[N]; which response of this micro-batch a token is of, from 0."""
    advantages: Tensor
    """[N] float32."""
    loss_weights: Tensor
    """[N] float32; the averaging rule, see ``rollouts.packing.loss_weights``."""
    generator_logprobs: Tensor
    """[N] float32; as the engine sampled them."""
    old_logprobs: Tensor | None
    """[N] float32; by the trainer before the first update of the phase. None: the policy's own, for there is no update
    before this micro-batch."""
    ref_logprobs: Tensor
    """[N] float32; by the frozen reference (zeros where there is none)."""

    @staticmethod
    def from_sequences(
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        sampled: Sequence[Sequence[bool] | None] | None = None,
        advantages: Sequence[float] | None = None,
        loss_weights: Sequence[float] | None = None,
        generator_logprobs: Sequence[Sequence[float]] | None = None,
        members: Sequence[int] | None = None,
    ) -> "MicroBatch":
        """Packs (prompt_ids, completion_ids) pairs; ``advantages`` and ``loss_weights`` are per sequence.

        Without ``members`` these are the first trained sequences of the phase.

        Neighbours with the same prompt share it. Completion tokens that weren't ``sampled`` are context like the
        prompt: they are in the row and not among the N.

        No sequences make a row of one token without response tokens, so that a rank with nothing to do can still take
        part in a collective forward pass. Prompts must not be empty.
        """
        input_ids: list[int] = []
        position_ids: list[int] = []
        row_lengths: list[list[int]] = []
        response_index: list[int] = []
        targets: list[int] = []
        generated: list[float] = []
        lengths: list[int] = []
        shared: Sequence[int] | None = None
        for i, (prompt_ids, completion_ids) in enumerate(sequences):
            if not prompt_ids:
                raise ValueError("a prompt needs at least one token: the first response token is predicted from it")
            if prompt_ids != shared:
                shared = prompt_ids
                input_ids += prompt_ids
                position_ids += range(len(prompt_ids))
                row_lengths.append([len(prompt_ids)])
                end = len(input_ids) - 1
            first = len(input_ids)
            own = completion_ids[:-1]
            input_ids += own
            position_ids += range(len(prompt_ids), len(prompt_ids) + len(own))
            row_lengths[-1].append(len(own))
            mask = sampled[i] if sampled else None
            trained = [t for t in range(len(completion_ids)) if mask is None or mask[t]]
            response_index += [first + t - 1 if t else end for t in trained]
            targets += [completion_ids[t] for t in trained]
            generated += [generator_logprobs[i][t] if generator_logprobs else 0.0 for t in trained]
            lengths.append(len(trained))
        repeats = torch.tensor(lengths, dtype=torch.long)

        def per_token(values: Sequence[float] | None) -> Tensor:
            values = [0.0] * len(lengths) if values is None else values
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(repeats)

        return MicroBatch(
            input_ids=torch.tensor(input_ids or [0]),
            position_ids=torch.tensor(position_ids or [0]),
            members=tuple(range(len(sequences)) if members is None else members),
            row_lengths=tuple(map(tuple, row_lengths)) or ((1,),),
            response_index=torch.tensor(response_index, dtype=torch.long),
            targets=torch.tensor(targets, dtype=torch.long),
            sequence_index=torch.arange(len(lengths)).repeat_interleave(repeats),
            advantages=per_token(advantages),
            loss_weights=per_token(loss_weights),
            generator_logprobs=torch.tensor(generated, dtype=torch.float32),
            old_logprobs=None,
            ref_logprobs=torch.zeros(len(targets)),
        )

    def first_group(self) -> "MicroBatch":
        """The first prompt of the row and what follows it."""
        tokens, completions = sum(self.row_lengths[0]), len(self.row_lengths[0]) - 1
        n = int((self.sequence_index < completions).sum())
        lengths = {"input_ids": tokens, "position_ids": tokens}
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        first = {name: x[: lengths.get(name, n)] for name, x in tensors.items()}
        return replace(self, row_lengths=self.row_lengths[:1], members=self.members[:completions], **first)

    def to(self, device: torch.device | str) -> "MicroBatch":
        """A copy on ``device``."""
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        moved = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return replace(self, members=self.members, row_lengths=self.row_lengths, **moved)


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
    trained: list[TrainedSequence] = field(default_factory=list)
    """All that are trained on, on all ranks."""
    canary: Tensor = field(default_factory=lambda: torch.empty(0))
    """Log-probs of the first micro-batch's first response tokens, scored before any update: see ``RatioCanary``."""

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)
