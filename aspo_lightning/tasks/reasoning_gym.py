"""Procedural tasks of reasoning-gym."""

from collections.abc import Iterator
from typing import Any

from aspo_lightning.errors import ConfigError
from aspo_lightning.tasks.base import Rewards, Task


class ReasoningGym(Task):
    """A procedural task of reasoning-gym, scored by its own verifier.

    Args:
        task: its name, e.g. ``chain_sum``.
        size: how many problems; of each level, if there are levels.
        seed: which problems.
        config: the task's own settings.
        levels: settings that make problems harder, one mapping a level, on top of ``config``; for ``RisingLevels``.
        reward: scores instead of the task's own verifier.
        environment, system_prompt, chat, thinking: see Task.
    """

    def __init__(
        self,
        task: str,
        size: int,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        levels: list[dict[str, Any]] | None = None,
        reward: Rewards = "aspo_lightning.rewards.reasoning_gym.reward",
        environment: str | None = None,
        system_prompt: str | None = None,
        chat: bool = True,
        thinking: bool | None = None,
    ) -> None:
        super().__init__(reward, environment, system_prompt, chat, thinking)
        self.task, self.size, self.seed, self.config, self.levels = task, size, seed, config or {}, levels
        self.has_levels = levels is not None
        if size < 1:
            raise ConfigError(f"ReasoningGym.size is {size}: an empty task. Set it to at least 1.")
        if levels is not None and not levels:
            raise ConfigError("ReasoningGym.levels is an empty list. Give each level's settings, or leave it out.")

    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        import reasoning_gym

        for level, settings in enumerate(self.levels or [{}]):
            config = {**self.config, **settings}
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
