"""One epoch, from the sync of the weights to scored micro-batches.

With a lag, what is drawn and sampled is the phase of a later epoch, in a thread: see ahead.py.

policy ── weights ──► engine                                    sync
                        │   ──► the probe: engine = trainer?    probe
curriculum ── prompts ──┤                                       draw
                        ▼
                   completions ──► rewards                      sample (again while too few groups are informative)
                        │
              every rank holds all groups                       keep the informative ones
                        │
        shaped rewards ──► advantages                           shape
                        │
optimizer steps × micro-batches × ranks, loss weights           pack
                        │
policy and reference ──► old and reference log-probs            score
                        │
                        ▼
                      Phase ──► training_step, batch by batch
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from aspo_lightning.engines.base import Adapters, Engine, engine_errors
from aspo_lightning.rollouts.ahead import PhaseSampler
from aspo_lightning.rollouts.corrections import Bypass, correct
from aspo_lightning.rollouts.mismatch import Probe
from aspo_lightning.rollouts.packing import pack, plan_phase
from aspo_lightning.rollouts.shaping import is_informative, rollout_metrics, trained_sequences
from aspo_lightning.types import MicroBatch, Phase, RolloutGroup


class Scorer(Protocol):
    """What scores micro-batches: see ``ASPOModule``, in module.py."""

    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for its completions in a micro-batch."""
        ...

    def score(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The policy's log-probs[N] of each, on the CPU."""
        ...

    def score_reference(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The reference's log-probs[N] of each, on the CPU."""
        ...


@runtime_checkable
class Policy(Scorer, Protocol):
    """What a phase needs from the module that trains: see ``ASPOModule``."""

    model_name_or_path: str
    temperature: float

    @property
    def adapter_rank(self) -> int:
        """Of the adapters that are trained; 0: the weights are."""
        ...

    def policy_adapters(self) -> Adapters:
        """The adapters that are trained."""
        ...

    def policy_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of each weight."""
        ...


class Rollouts:
    """Makes the phase of each epoch: on policy, or with ``data.lag`` sampled ahead of it.

    Args:
        phases: draws and samples, now or ahead, with the engine that takes over the weights.
        probe: compares engine and trainer after each sync. None: nothing does.
        quadratic_cost: of attention, see ``packing.plan_phase``.
    """

    def __init__(
        self,
        phases: PhaseSampler,
        *,
        probe: Probe | None = None,
        quadratic_cost: float = 0.0,
    ) -> None:
        self.phases, self.probe, self.quadratic_cost = phases, probe, quadratic_cost
        self.sampler, self.settings = phases.sampler, phases.settings

    def phase(self, policy: Policy, epoch: int, *, end: int | None = None) -> Phase:
        """One epoch: all its groups, and what this rank trains on. Collective.

        Args:
            policy: with the weights of this epoch, before its updates.
            epoch: its number.
            end: the first epoch that no longer is one of the run; nothing is sampled for it.
        """
        self.phases.wait()
        sync_s, probe = 0.0, None
        ahead = epoch + self.settings.lag + 1
        if missing := self.phases.missing(range(epoch, ahead if end is None else min(ahead, end))):
            sync_s = sync(self.sampler.engine, policy)
            probe = self.probe.sample(self.sampler.engine) if self.probe else None
        if epoch in missing:
            self.phases.sample(missing.pop(0), weights_epoch=epoch)
            self.sampler.engine.sleep()
        if missing:
            self.phases.sample_meanwhile(missing, weights_epoch=epoch)
        sampled = self.phases.take(epoch)
        phase = self.train_on(sampled.groups, policy, epoch, probe)
        phase.metrics.update(sampled.metrics, **{"time/sync_s": sync_s})
        if self.settings.lag:
            lag = {"rollout/lag": float(epoch - sampled.weights_epoch), "time/wait_s": self.phases.waited_s()}
            phase.metrics.update(lag)
        return phase

    def train_on(
        self, groups: Sequence[RolloutGroup], scorer: Scorer, epoch: int, probe: MicroBatch | None = None
    ) -> Phase:
        """Turns sampled groups into the scored micro-batches of this rank.

        Groups without reward spread are in no numerator and no denominator of the loss, unless ``no_spread`` is keep.
        Of the others the first ``prompts_per_phase`` are trained on, ``passes`` times.
        """
        settings, rank, world_size = self.settings, self.sampler.rank, self.sampler.world_size
        keep_all, limit = settings.no_spread == "keep", settings.max_completion_length
        kept = [g for g in groups if keep_all or is_informative(g, settings, limit)][: settings.prompts_per_phase]
        sequences = trained_sequences(kept, settings, limit)
        plan = plan_phase(
            [(len(group[0].prompt_ids), [len(s.rollout.completion_ids) for s in group]) for group in sequences],
            optimizer_steps=settings.optimizer_steps,
            groups_per_step=settings.groups_per_step,
            world_size=world_size,
            token_budget=settings.micro_batch_tokens,
            quadratic_cost=self.quadratic_cost,
            shared=scorer.shares_prompts(),
        )
        trained = [s for group in sequences for s in group]
        rows = pack(trained, plan, settings.averaging, limit, rank, world_size)
        start = time.perf_counter()
        scored, canary = self.score(scorer, rows, plan.accumulate, probe)
        score_s = time.perf_counter() - start
        corrected, effect = correct(scored, settings.mismatch)
        metrics = {
            **rollout_metrics(groups),
            **effect,
            "rollout/kept_groups": float(len(kept)),
            "time/score_s": score_s,
            "throughput/score_tokens_s": sum(len(row.input_ids) for row in rows) / score_s,
        }
        return Phase(epoch, corrected * settings.passes, plan.accumulate, list(groups), metrics, trained, canary)

    def score(
        self, scorer: Scorer, rows: Sequence[MicroBatch], accumulate: int, probe: MicroBatch | None
    ) -> tuple[list[MicroBatch], Tensor]:
        """The rows with old and reference log-probs, and the canary; the probe is looked at on the way.

        The old log-probs of the first optimizer step are what it computes itself: its rows get none, where nothing
        needs them before or after it. But its first group is the canary: scored, to be compared with what is trained.
        Where the first row is scored, that is the canary.
        """
        settings = self.settings
        bypass = isinstance(settings.mismatch, Bypass)
        needed = not bypass and (settings.passes > 1 or settings.mismatch is not None)
        unscored = len(rows) if bypass else accumulate
        scored = rows if needed else [rows[0].first_group(), *rows[unscored:]]
        # In one call: a sharded model is gathered once.
        logprobs = scorer.score([*([probe] if probe else []), *scored])
        if self.probe and probe:
            self.probe.check(probe, logprobs.pop(0))
        canary, *later = logprobs
        old = logprobs if needed else [*[None] * unscored, *later]
        if bypass:
            old = [row.generator_logprobs for row in rows]
        scores = zip(rows, old, scorer.score_reference(rows), strict=True)
        return [replace(row, old_logprobs=own, ref_logprobs=ref) for row, own, ref in scores], canary


def sync(engine: Engine, policy: Policy) -> float:
    """Gives the engine the policy's weights as they are now. Returns the seconds that took.

    Before every sampling: what changes weights (a step, a callback that averages them, a checkpoint) can't be seen from
    the outside.
    """
    start = time.perf_counter()
    with engine_errors():
        if engine.takes_adapters:
            engine.sync_adapters(policy.policy_adapters())
        else:
            engine.sync_weights(policy.policy_weights(engine.weights_dtype))
    return time.perf_counter() - start
