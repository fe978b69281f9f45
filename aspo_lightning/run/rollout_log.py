"""Keeps the completions of a fit's epochs, with what became of them in training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aspo_lightning.collectives import gather
from aspo_lightning.errors import ConfigError
from aspo_lightning.objectives import Objective, Tokens
from aspo_lightning.run.folder import run_folder
from aspo_lightning.run.lightning import phase_of, tokenizer_of
from aspo_lightning.run.rollout_files import RolloutRecord, TokenRecord, rollout_files, rollout_path, write_rollouts
from aspo_lightning.types import MicroBatch, Phase


class Share(NamedTuple):
    """Sums over the tokens of some of a phase's trained sequences, and over the passes."""

    members: tuple[int, ...]
    sums: Tensor
    """[3, members]: of the ratio, of whether a token was clipped, of tokens."""


@dataclass
class Trained:
    """How the sequences of a phase were trained, on this rank."""

    shares: list[Share] = field(default_factory=list)
    last: tuple[MicroBatch, Tensor, Tensor] | None = None
    """The last micro-batch, the ratio[N] and the entropy[N] of its tokens."""

    def add(self, batch: MicroBatch, logprobs: Tensor, entropy: Tensor, objective: Objective) -> None:
        """Measures a micro-batch; all on its device, which nothing waits for."""
        old = logprobs if batch.old_logprobs is None else batch.old_logprobs
        tokens = Tokens.of(
            logprobs,
            old,
            batch.advantages,
            batch.sequence_index,
            token_entropy=entropy,
            generator_logprobs=batch.generator_logprobs,
            ref_logprobs=batch.ref_logprobs,
        )
        ratio, clipped = tokens.ratio, objective.weigh(tokens).clipped
        each = torch.stack([ratio, clipped.to(ratio.dtype), torch.ones_like(ratio)])
        sums = each.new_zeros(3, len(batch.members)).index_add_(1, batch.sequence_index, each)
        self.shares.append(Share(batch.members, sums))
        self.last = (batch, ratio, entropy)

    def totals(self) -> dict[int, list[float]]:
        """The sums of each sequence, by its number."""
        found: dict[int, list[float]] = {}
        for members, sums in self.shares:
            for member, values in zip(members, sums.T.tolist(), strict=True):
                found[member] = [a + b for a, b in zip(found.get(member, [0.0] * 3), values, strict=True)]
        return found


class RolloutLog(Callback):
    """Keeps the completions of an epoch in ``rollouts/`` in the run's folder, see ``rollout_files``.

    The same phase makes the same file, so a resumed run writes what the run that never stopped would have.

    Args:
        every_n_epochs: number of epochs between those that are kept. 0 keeps none.
        keep: of so many epochs; older files are removed.
    """

    def __init__(self, every_n_epochs: int = 1, keep: int = 100) -> None:
        if every_n_epochs < 0 or keep < 1:
            raise ConfigError(
                f"rollout_log.every_n_epochs is {every_n_epochs} and rollout_log.keep {keep}; the first must be at "
                "least 0 (which keeps no completions), the second at least 1."
            )
        self.every_n_epochs, self.keep = every_n_epochs, keep
        self._trained: Trained | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        n = self.every_n_epochs
        due = n > 0 and trainer.current_epoch % n == 0 and run_folder(trainer) is not None
        self._trained = Trained() if due else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self._trained is None:
            return
        assert isinstance(outputs, Mapping)
        assert isinstance(batch, MicroBatch)
        assert isinstance(pl_module.objective, Objective)
        self._trained.add(batch, outputs["logprobs"], outputs["entropy"], pl_module.objective)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trained is None:
            return
        totals = {n: sums for share in gather(self._trained.totals()) for n, sums in share.items()}
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        tokens = token_records(self._trained, tokenizer_of(trainer))
        write_rollouts(rollout_path(folder.path, trainer.current_epoch), records(phase_of(trainer), totals, tokens))
        for path in list(rollout_files(folder.path).values())[: -self.keep]:
            path.unlink()


def token_records(trained: Trained, tokenizer: PreTrainedTokenizerBase) -> dict[int, TokenRecord]:
    """The tokens of the last micro-batch, by the number of their sequence."""
    if trained.last is None:
        return {}
    batch, ratio, entropy = trained.last
    found = {}
    for i, member in enumerate(batch.members):
        where = batch.sequence_index == i
        text = [str(tokenizer.decode([token])) for token in batch.targets[where].tolist()]
        found[member] = TokenRecord(text=text, ratio=ratio[where].tolist(), entropy=entropy[where].tolist())
    return found


def records(
    phase: Phase, totals: Mapping[int, list[float]], tokens: Mapping[int, TokenRecord]
) -> Iterator[RolloutRecord]:
    """All completions of a phase, in the order sampled.

    Args:
        phase: of the epoch.
        totals: sums of the ratio, of clipped tokens and of tokens, by the number of a trained sequence.
        tokens: of some of them.
    """
    numbers = {id(sequence.rollout): number for number, sequence in enumerate(phase.trained)}
    for group in phase.groups:
        for sample, rollout in enumerate(group.rollouts):
            number = numbers.get(id(rollout), -1)  # -1: not trained
            ratios, clipped, count = totals.get(number, (0.0, 0.0, 0.0))
            yield RolloutRecord(
                prompt_id=group.prompt.id,
                sample=sample,
                question=group.prompt.question,
                completion=rollout.text,
                reward=rollout.reward,
                rewards=dict(rollout.rewards),
                advantage=None if number < 0 else phase.trained[number].advantage,
                solved=rollout.solved,
                truncated=rollout.truncated,
                failed=rollout.failed,
                turns=rollout.turns,
                length=rollout.sampled_length,
                repetition_rate=rollout.repetition_rate,
                ratio=ratios / count if count else None,
                clipped=clipped / count if count else None,
                tokens=tokens.get(number),
            )
