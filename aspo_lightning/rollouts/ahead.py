"""The groups of an epoch: sampled when it begins, or while the epochs before it train.

With ``data.lag`` n the phase of epoch e is sampled by the weights with which epoch e - n began. Once epoch e has taken
its groups, those of e + n are sampled in a thread, by the servers, until the next epoch begins:

    epoch       e              e + 1              (lag 1)
    servers     phase e + 1    phase e + 2
    trainer     phase e        phase e + 1

All that a run starts with, epochs 0 to n, is sampled by its first weights. A phase is a function of its seed and of
those weights, whatever the trainer does meanwhile. A checkpoint has the phases that are sampled and not yet trained on.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields

import torch

from aspo_lightning.curriculum import Curriculum
from aspo_lightning.errors import ConfigError
from aspo_lightning.rollouts.sampling import Sampler
from aspo_lightning.rollouts.settings import RolloutSettings
from aspo_lightning.rollouts.shaping import is_informative
from aspo_lightning.types import Prompt, Rollout, RolloutGroup, State

_BY_TOKEN = ("completion_ids", "generator_logprobs", "sampled")
_PLAIN = [field.name for field in fields(Rollout) if field.name not in _BY_TOKEN]  # the other fields


@dataclass(frozen=True)
class SampledPhase:
    """The groups of an epoch, on every rank, before they are trained on."""

    epoch: int
    weights_epoch: int
    """The epoch that began with the weights that sampled them."""
    groups: list[RolloutGroup]
    """In the order sampled."""
    metrics: dict[str, float]
    """By TensorBoard tag: seconds, and what the curriculum measures."""


class PhaseSampler:
    """Draws and samples the groups of epochs, and keeps them until they are trained on.

    Args:
        sampler: samples and scores groups.
        curriculum: which prompts an epoch draws.
        prompts: to draw from.
        settings: ``data.*``.
    """

    def __init__(
        self, sampler: Sampler, curriculum: Curriculum, prompts: Sequence[Prompt], settings: RolloutSettings
    ) -> None:
        self.sampler, self.curriculum, self.prompts, self.settings = sampler, curriculum, prompts, settings
        self._phases: dict[int, SampledPhase] = {}
        self._ended: Future[None] | None = None
        """Of what is sampled meanwhile, until somebody has waited for it."""
        self._waited_s = 0.0

    def sample(self, epoch: int, *, weights_epoch: int, description: str | None = "generate") -> None:
        """Samples the groups of an epoch, by the weights that the engine has. Collective.

        With ``no_spread: refill`` more are sampled while too few are informative (DAPO's dynamic sampling).

        Args:
            epoch: whose groups.
            weights_epoch: the one that began with these weights.
            description: of the progress bars; None: there are none.
        """
        settings = self.settings
        groups: list[RolloutGroup] = []
        times: dict[str, float] = {}
        for attempt in range(settings.refills + 1):
            informative = sum(is_informative(g, settings, settings.max_completion_length) for g in groups)
            lacking = settings.prompts_per_phase - informative
            if lacking <= 0 or not (prompts := self.draw(epoch, attempt, lacking, groups)):
                break
            more, seconds = self.sampler.groups(prompts, settings.sampling, epoch=epoch, description=description)
            groups += more
            times = {key: times.get(key, 0.0) + value for key, value in seconds.items()}
        sampled = sum(rollout.sampled_length for group in groups for rollout in group.rollouts)
        speed = sampled / times["time/generate_s"] / self.sampler.world_size
        metrics = {**times, "throughput/generate_tokens_s": speed, **self.curriculum.update(groups)}
        self._phases[epoch] = SampledPhase(epoch, weights_epoch, groups, metrics)

    def draw(self, epoch: int, attempt: int, lacking: int, so_far: Sequence[RolloutGroup]) -> list[Prompt]:
        """The prompts of a first attempt; after it the ``lacking`` ones, of prompts not yet drawn."""
        seed, count = self.settings.seed, self.settings.prompts_per_phase
        if attempt == 0:
            return self.curriculum.draw(self.prompts, count, epoch=epoch, seed=seed)
        drawn = {group.prompt.id for group in so_far}
        left = [prompt for prompt in self.prompts if prompt.id not in drawn]
        return self.curriculum.draw_more(left, lacking, epoch=epoch, seed=seed, attempt=attempt)

    def sample_meanwhile(self, epochs: Sequence[int], *, weights_epoch: int) -> None:
        """Samples the groups of epochs, one after the other, while the caller does something else until ``wait``."""
        ended: Future[None] = Future()

        def work() -> None:
            try:
                for epoch in epochs:
                    self.sample(epoch, weights_epoch=weights_epoch, description=None)  # the updates have a bar
                ended.set_result(None)
            except BaseException as error:
                ended.set_exception(error)

        self._ended = ended
        # A daemon: a run that ends, for whatever reason, doesn't wait for completions.
        threading.Thread(target=work, name="phase sampler", daemon=True).start()

    def wait(self) -> None:
        """Returns when nothing is sampled any longer: the engine can take other weights, the state be kept.

        Raises:
            AspoError: what became of the sampling.
        """
        if self._ended:
            start = time.perf_counter()
            self._ended.result()
            self._waited_s += time.perf_counter() - start
            self._ended = None

    def waited_s(self) -> float:
        """Seconds in ``wait`` since this was last asked, whoever called it."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def missing(self, epochs: range) -> list[int]:
        """Those of the epochs that have yet to be sampled."""
        return [epoch for epoch in epochs if epoch not in self._phases]

    def take(self, epoch: int) -> SampledPhase:
        """The groups of an epoch, which nobody needs after it."""
        return self._phases.pop(epoch)

    def cancel(self) -> None:
        """Has what is being sampled given up at its next completion.

        Several ranks finish it instead: one that gave up would leave the others waiting for its share.
        """
        if self.sampler.world_size == 1:
            self.sampler.stop()

    def stop(self) -> None:
        """Gives up what is being sampled, and returns when nothing is."""
        if self._ended:
            self.cancel()
            self._ended.exception()  # until it has ended; ``wait`` still raises it

    def state_dict(self) -> list[State]:
        """The phases that are sampled and not yet trained on, as tensors and plain data. Waits for the last of them.

        Raises:
            AspoError: that one broke, or was given up. Without it a run would not resume as it was.
        """
        self.wait()
        return [_packed(phase) for phase in self._phases.values()]

    def load_state_dict(self, state: Sequence[State]) -> None:
        """Resumes from what ``state_dict`` gave.

        Raises:
            ConfigError: a prompt is no longer there.
        """
        prompts = {prompt.id: prompt for prompt in self.prompts}
        self._phases = {phase["epoch"]: _unpacked(phase, prompts) for phase in state}


def _packed(phase: SampledPhase) -> State:
    """Its tokens in one tensor: as numbers of Python, a long phase would take a minute to load."""
    rollouts = [rollout for group in phase.groups for rollout in group.rollouts]
    whole = [rollout.sampled or (True,) * len(rollout.completion_ids) for rollout in rollouts]
    return {
        "epoch": phase.epoch,
        "weights_epoch": phase.weights_epoch,
        "metrics": phase.metrics,
        "prompts": [group.prompt.id for group in phase.groups],
        "completion_ids": torch.tensor([i for r in rollouts for i in r.completion_ids], dtype=torch.int32),
        "generator_logprobs": torch.tensor([x for r in rollouts for x in r.generator_logprobs], dtype=torch.float64),
        "sampled": torch.tensor([mark for marks in whole for mark in marks], dtype=torch.bool),
        "lengths": [len(rollout.completion_ids) for rollout in rollouts],
        "rollouts": [{name: getattr(rollout, name) for name in _PLAIN} for rollout in rollouts],
    }


def _unpacked(state: State, prompts: Mapping[str, Prompt]) -> SampledPhase:
    """What was packed."""
    ids, logprobs, sampled = (state[name].split(state["lengths"]) for name in _BY_TOKEN)
    rollouts = [
        Rollout(
            completion_ids=tuple(ids[i].tolist()),
            generator_logprobs=tuple(logprobs[i].tolist()),
            sampled=None if sampled[i].all() else tuple(sampled[i].tolist()),
            **plain,
        )
        for i, plain in enumerate(state["rollouts"])
    ]
    size = len(rollouts) // len(state["prompts"])
    groups = [
        RolloutGroup(_known(id, prompts), tuple(rollouts[i * size : (i + 1) * size]))
        for i, id in enumerate(state["prompts"])
    ]
    return SampledPhase(state["epoch"], state["weights_epoch"], groups, state["metrics"])


def _known(id: str, prompts: Mapping[str, Prompt]) -> Prompt:
    if id not in prompts:
        raise ConfigError(
            f"The checkpoint has completions of the prompt {id!r} that have yet to be trained on (data.lag), but it is "
            "no longer among the training prompts. Resume with the data.train and data.val that the run had."
        )
    return prompts[id]
