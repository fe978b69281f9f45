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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields

from aspo_lightning.curriculum import Curriculum
from aspo_lightning.errors import ConfigError
from aspo_lightning.rollouts.sampling import Sampler
from aspo_lightning.rollouts.settings import RolloutSettings
from aspo_lightning.rollouts.shaping import is_informative
from aspo_lightning.types import Prompt, Rollout, RolloutGroup, State


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
        self._thread: threading.Thread | None = None
        self._ended: Future[None] = Future()

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
            missing = settings.prompts_per_phase - informative
            if missing <= 0 or not (prompts := self.draw(epoch, attempt, missing, groups)):
                break
            more, seconds = self.sampler.groups(prompts, settings.sampling, epoch=epoch, description=description)
            groups += more
            times = {key: times.get(key, 0.0) + value for key, value in seconds.items()}
        sampled = sum(rollout.sampled_length for group in groups for rollout in group.rollouts)
        speed = sampled / times["time/generate_s"] / self.sampler.world_size
        metrics = {**times, "throughput/generate_tokens_s": speed, **self.curriculum.update(groups)}
        self._phases[epoch] = SampledPhase(epoch, weights_epoch, groups, metrics)

    def draw(self, epoch: int, attempt: int, missing: int, so_far: Sequence[RolloutGroup]) -> list[Prompt]:
        """The prompts of a first attempt; after it the ``missing`` ones, of prompts not yet drawn."""
        seed, count = self.settings.seed, self.settings.prompts_per_phase
        if attempt == 0:
            return self.curriculum.draw(self.prompts, count, epoch=epoch, seed=seed)
        drawn = {group.prompt.id for group in so_far}
        left = [prompt for prompt in self.prompts if prompt.id not in drawn]
        return self.curriculum.draw_more(left, missing, epoch=epoch, seed=seed, attempt=attempt)

    def sample_meanwhile(self, epochs: Sequence[int], *, weights_epoch: int) -> None:
        """Samples the groups of epochs, one after the other, while the caller does something else until ``wait``."""
        ended: Future[None] = Future()
        self._ended = ended

        def work() -> None:
            try:
                for epoch in epochs:
                    self.sample(epoch, weights_epoch=weights_epoch, description=None)  # the updates have a bar
                ended.set_result(None)
            except BaseException as error:
                ended.set_exception(error)

        # A daemon: a run that ends, for whatever reason, doesn't wait for completions.
        self._thread = threading.Thread(target=work, name="phase sampler", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is sampled any longer: the engine can take other weights, the state be kept.

        Raises:
            AspoError: what became of the sampling.
        """
        if self._thread:
            self._ended.result()
            self._thread = None

    def missing(self, epochs: range) -> list[int]:
        """Those of the epochs that have yet to be sampled."""
        return [epoch for epoch in epochs if epoch not in self._phases]

    def take(self, epoch: int) -> SampledPhase:
        """The groups of an epoch, which nobody needs after it."""
        return self._phases.pop(epoch)

    def cancel(self) -> None:
        """Has what is being sampled given up at its next completion."""
        if self._thread:
            self.sampler.stop()

    def stop(self) -> None:
        """Gives up what is being sampled, and returns when nothing is.

        Several ranks finish it: one that gave up would leave the others waiting for its share.
        """
        if self._thread:
            if self.sampler.world_size == 1:
                self.cancel()
            self._thread.join()
            self._thread = None

    def state_dict(self) -> list[State]:
        """The phases that are sampled and not yet trained on, as plain data; waits for the one in the making."""
        self.wait()
        return [
            {
                "epoch": phase.epoch,
                "weights_epoch": phase.weights_epoch,
                "metrics": phase.metrics,
                "groups": [
                    (group.prompt.id, [_plain(rollout) for rollout in group.rollouts]) for group in phase.groups
                ],
            }
            for phase in self._phases.values()
        ]

    def load_state_dict(self, state: Sequence[State]) -> None:
        """Resumes from what ``state_dict`` gave.

        Raises:
            ConfigError: a prompt is no longer there.
        """
        prompts = {prompt.id: prompt for prompt in self.prompts}
        self._phases = {
            phase["epoch"]: SampledPhase(
                phase["epoch"],
                phase["weights_epoch"],
                [
                    RolloutGroup(_of(prompts, id), tuple(Rollout(**rollout) for rollout in rollouts))
                    for id, rollouts in phase["groups"]
                ],
                phase["metrics"],
            )
            for phase in state
        }


def _plain(rollout: Rollout) -> Mapping[str, object]:
    return {field.name: getattr(rollout, field.name) for field in fields(rollout)}


def _of(prompts: Mapping[str, Prompt], id: str) -> Prompt:
    if id not in prompts:
        raise ConfigError(
            f"The checkpoint has completions of the prompt {id!r} that have yet to be trained on (data.lag), but "
            "data.train no longer has that prompt. Resume with the task that the run was started with."
        )
    return prompts[id]
