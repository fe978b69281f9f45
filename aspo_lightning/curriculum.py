"""Which prompts a phase samples. Draws are functions of (seed, epoch) and of state that checkpoints keep."""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence

from lightning.pytorch.utilities import rank_zero_info

from aspo_lightning.errors import ConfigError
from aspo_lightning.evaluation.metrics import accuracy
from aspo_lightning.types import Prompt, RolloutGroup, State


class Curriculum(ABC):
    """Draws the prompts of each phase, and may learn from what became of them."""

    def check(self, prompts: Sequence[Prompt], count: int) -> None:  # noqa: B027 - most draw from all prompts
        """Raises ConfigError unless it can draw ``count`` of the prompts in every epoch."""

    @abstractmethod
    def draw(self, prompts: Sequence[Prompt], count: int, *, epoch: int, seed: int) -> list[Prompt]:
        """``count`` different prompts for an epoch; fewer where there are no more."""

    def draw_more(self, prompts: Sequence[Prompt], count: int, *, epoch: int, seed: int, attempt: int) -> list[Prompt]:
        """Further ones for the same epoch, to refill it, out of ``prompts`` that have not been drawn so far."""
        return random.Random(f"{seed}/{epoch}/{attempt}").sample(list(prompts), min(count, len(prompts)))

    def update(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Takes note of a sampled phase. Returns what to log about it, by TensorBoard tag."""
        return {}

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:  # noqa: B027 - most have no state
        """Resumes from what ``state_dict`` gave."""


def saved(curriculum: Curriculum) -> State:
    """A curriculum's state, with the class it is of."""
    return {"class": type(curriculum).__name__, "state": curriculum.state_dict()}


def resume(curriculum: Curriculum, state: State) -> None:
    """Has a curriculum resume from what ``saved`` gave. It starts afresh if the state is of another kind."""
    name = type(curriculum).__name__
    if state.get("class") == name:
        curriculum.load_state_dict(state["state"])
    else:
        rank_zero_info(f"{name} starts afresh: the checkpoint's curriculum is {state.get('class', 'another')}")


class Shuffled(Curriculum):
    """All prompts in turn, in a new order each pass. A prompt drawn to refill a phase is drawn again in its turn."""

    def draw(self, prompts: Sequence[Prompt], count: int, *, epoch: int, seed: int) -> list[Prompt]:
        count = min(count, len(prompts))
        order = itertools.chain.from_iterable(passes(len(prompts), count, seed))
        return [prompts[i] for i in itertools.islice(order, epoch * count, (epoch + 1) * count)]


def passes(size: int, count: int, seed: int) -> Iterator[list[int]]:
    """The order of 0 to size - 1 in each pass, to be drawn ``count`` at a time.

    A draw that begins in one pass and ends in the next has no prompt twice.
    """
    begun: set[int] = set()  # what a pass leaves to a draw that ends in the next
    for number in itertools.count():
        order = list(range(size))
        random.Random(f"{seed}/{number}").shuffle(order)
        if begun:
            end = [i for i in order if i not in begun][: count - len(begun)]
            ended = set(end)
            order = end + [i for i in order if i not in ended]
        yield order
        begun = set(order[size - (number + 1) * size % count :])


class PassRate(Curriculum):
    """Favours prompts that the policy solves about half of the time: those teach most.

    A prompt's chance grows with p (1 - p) of its running pass rate p; one not seen so far counts as p = 1/2.

    Args:
        smoothing: share of the newest pass rate in the running one.
        floor: chance of a prompt that is always or never solved, relative to one at p = 1/2; keeps all in play.
    """

    def __init__(self, smoothing: float = 0.5, floor: float = 0.1) -> None:
        for name, value in (("smoothing", smoothing), ("floor", floor)):
            if not 0 < value <= 1:
                raise ConfigError(f"PassRate.{name} is {value}; it must be above 0 and at most 1.")
        self.smoothing, self.floor = smoothing, floor
        self.rates: dict[str, float] = {}

    def draw(self, prompts: Sequence[Prompt], count: int, *, epoch: int, seed: int) -> list[Prompt]:
        generator = random.Random(f"{seed}/{epoch}")

        def key(prompt: Prompt) -> float:
            # The largest of u^(1/w) are a sample without replacement, weighted by w (Efraimidis and Spirakis, 2006).
            rate = self.rates.get(prompt.id, 0.5)
            weight = self.floor + (1 - self.floor) * 4 * rate * (1 - rate)
            return math.log(1 - generator.random()) / weight

        keys = [key(p) for p in prompts]
        best = sorted(range(len(prompts)), key=lambda i: -keys[i])[:count]
        return [prompts[i] for i in best]

    def update(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        for group in groups:
            before = self.rates.get(group.prompt.id)
            now = accuracy([group])
            self.rates[group.prompt.id] = now if before is None else before + self.smoothing * (now - before)
        return {}

    def state_dict(self) -> State:
        return {"rates": dict(self.rates)}

    def load_state_dict(self, state: State) -> None:
        self.rates = dict(state["rates"])


class RisingLevels(Curriculum):
    """Starts with the prompts of the lowest level, and moves to the next one as soon as a phase is solved well enough.

    Each level must have enough prompts for a phase.

    Args:
        threshold: accuracy of a phase that ends its level.
    """

    def __init__(self, threshold: float = 0.7) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"RisingLevels.threshold is {threshold}; it must be above 0 and at most 1.")
        self.threshold = threshold
        self.level = 0  # index into the sorted levels
        self._drawn = 0  # the level that the phase was drawn from

    def check(self, prompts: Sequence[Prompt], count: int) -> None:
        for level, size in sorted(Counter(p.level for p in prompts).items()):
            if size < count:
                raise ConfigError(
                    f"Level {level} of the training task has {size} prompts, fewer than "
                    f"data.prompts_per_phase {count}, and RisingLevels draws a phase from one level. Give it more, or "
                    "lower prompts_per_phase."
                )

    def draw(self, prompts: Sequence[Prompt], count: int, *, epoch: int, seed: int) -> list[Prompt]:
        levels = sorted({p.level for p in prompts})
        self.level = min(self.level, len(levels) - 1)
        self._drawn = levels[self.level]
        return Shuffled().draw([p for p in prompts if p.level == self._drawn], count, epoch=epoch, seed=seed)

    def draw_more(self, prompts: Sequence[Prompt], count: int, *, epoch: int, seed: int, attempt: int) -> list[Prompt]:
        same = [p for p in prompts if p.level == self._drawn]
        return super().draw_more(same, count, epoch=epoch, seed=seed, attempt=attempt)

    def update(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        level = self.level
        if accuracy(groups) >= self.threshold:
            self.level += 1
        return {"rollout/level": float(level)}

    def state_dict(self) -> State:
        return {"level": self.level}

    def load_state_dict(self, state: State) -> None:
        self.level = int(state["level"])
