"""Several tasks as one."""

import math
import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from aspo_lightning.errors import ConfigError
from aspo_lightning.tasks.base import Task, log_dropped
from aspo_lightning.types import Prompt, Row


class Mixture(Task):
    """Several tasks together. A prompt that several of them have is taken from the first.

    Args:
        tasks: by name, which goes before their ids.
        weights: how often a pass through the mixture goes through a task: 2 takes each of its problems twice, 0.5 a
            random half of them. A task that isn't named has 1.
        seed: of those random parts.
    """

    def __init__(self, tasks: dict[str, Task], weights: dict[str, float] | None = None, seed: int = 0) -> None:
        self.tasks, self.weights, self.seed = tasks, weights or {}, seed
        if unknown := set(self.weights) - set(tasks):
            raise ConfigError(f"Mixture.weights names {sorted(unknown)}, but the tasks are {sorted(tasks)}.")
        for name, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ConfigError(f"Mixture.weights.{name} is {weight}; it must be finite and at least 0.")

    def rows(self) -> Iterator[tuple[str, str, Row]]:
        for name, task in self.tasks.items():
            for id, question, row in task.rows():
                yield f"{name}/{id}", question, row

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        mixed: list[Prompt] = []
        taken: set[tuple[int, ...]] = set()
        for name, task in self.tasks.items():
            weight = self.weights.get(name, 1.0)
            if not weight:
                continue
            found = task.prompts(tokenizer)
            prompts = [p.renamed(f"{name}/{p.id}") for p in found if p.prompt_ids not in taken]
            log_dropped(len(found), len(prompts), f"{name} shares them with tasks before it in the mixture")
            taken.update(p.prompt_ids for p in prompts)
            whole = int(weight)
            for turn in range(whole):
                mixed += [p.renamed(f"{p.id}#{turn}") if turn else p for p in prompts]
            part = random.Random(f"{self.seed}/{name}").sample(prompts, round((weight - whole) * len(prompts)))
            mixed += [p.renamed(f"{p.id}#{whole}") if whole else p for p in part]
        return mixed

    def functions(self) -> set[str]:
        return {function for task in self.tasks.values() for function in task.functions()}
