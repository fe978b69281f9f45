"""Procedural tasks of reasoning-gym."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from aspo_lightning.errors import ConfigError
from aspo_lightning.tasks.base import Rewards, Task
from aspo_lightning.types import Row


@dataclass
class ReasoningGym(Task):
    """A procedural task of reasoning-gym, with its own verifier as the reward."""

    task: str
    """Its name, e.g. ``chain_sum``."""
    size: int
    """How many problems; of each level, if there are levels."""
    seed: int = 0
    """Which problems."""
    config: Row | None = None
    """The task's own settings."""
    levels: list[Row] | None = None
    """Settings that make problems harder, one mapping a level, on top of ``config``; for ``RisingLevels``."""
    reward: Rewards = field(default="aspo_lightning.rewards.reasoning_gym.reward", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.has_levels = self.levels is not None
        if self.size < 1:
            raise ConfigError(f"ReasoningGym.size is {self.size}: an empty task. Set it to at least 1.")
        if self.levels is not None and not self.levels:
            raise ConfigError("ReasoningGym.levels is an empty list. Give each level's settings, or leave it out.")

    def rows(self) -> Iterator[tuple[str, str, Row]]:
        import reasoning_gym

        for level, settings in enumerate(self.levels or [{}]):
            config = {**(self.config or {}), **settings}
            try:
                dataset = reasoning_gym.create_dataset(self.task, size=self.size, seed=self.seed, **config)
            except (ValueError, TypeError, AssertionError) as error:
                raise ConfigError(f"reasoning-gym can't make the task {self.task!r} with {config}: {error}.") from error
            for index in range(self.size):
                row = dataset[index]
                id = f"{self.task}/{self.seed}/{index}"
                if self.levels is None:
                    yield id, row["question"], row
                else:
                    yield f"{id}/level{level}", row["question"], {**row, "level": level}
