"""Where prompts come from: procedural tasks and files."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from aspo_lightning.errors import ConfigError
from aspo_lightning.types import Prompt


class Task(ABC):
    """A source of problems, each with what its reward needs.

    Args:
        reward: import path of ``reward(completion: str, row: dict) -> float``; 1.0 is a full solution.
        system_prompt: put before each problem. None leaves it to the chat template.
        chat: put problems into the model's chat template, if its tokenizer has one; otherwise they are plain text
            that the model continues.
    """

    def __init__(self, reward: str, system_prompt: str | None = None, chat: bool = True) -> None:
        self.reward = reward
        self.system_prompt = system_prompt
        self.chat = chat

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yields (id, question, row); ids are unique and stable.

        Raises:
            ConfigError: for a row that can't be used; the message says which.
        """

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """The problems, ready to be sampled from."""
        prompts = []
        for id, question, row in self.rows():
            if self.chat and tokenizer.chat_template:
                system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt is not None else []
                text: Any = tokenizer.apply_chat_template(
                    [*system, {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
                )
                ids = tokenizer(text, add_special_tokens=False).input_ids  # the template wrote the special tokens
            else:
                text = f"{self.system_prompt}\n\n{question}" if self.system_prompt else question
                ids = tokenizer(text).input_ids
            prompts.append(Prompt(id, tuple(ids), text, self.reward, row))
        return prompts


class ReasoningGym(Task):
    """A procedural task of reasoning-gym, scored by its own verifier.

    Args:
        task: its name, e.g. ``chain_sum``.
        size: how many problems.
        seed: which problems.
        config: the task's own settings.
        system_prompt, chat: see Task.
    """

    def __init__(
        self,
        task: str,
        size: int,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        chat: bool = True,
    ) -> None:
        super().__init__("aspo_lightning.rewards.reasoning_gym.reward", system_prompt, chat)
        self.task, self.size, self.seed, self.config = task, size, seed, config or {}
        if size < 1:
            raise ConfigError(f"ReasoningGym.size is {size}: an empty task. Set it to at least 1.")

    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        import reasoning_gym

        try:
            dataset = reasoning_gym.create_dataset(self.task, size=self.size, seed=self.seed, **self.config)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"reasoning-gym can't make the task {self.task!r} with {self.config}: {error}."
            ) from error
        for index in range(self.size):
            row = dataset[index]
            yield f"{self.task}/{self.seed}/{index}", row["question"], row


class JSONLines(Task):
    """Problems from a JSONL file, one object a line.

    Args:
        path: the file.
        question: key of the problem's text.
        answer: key of the reference answer; handed to the reward as ``row["answer"]``.
        reward, system_prompt, chat: see Task.
    """

    def __init__(
        self,
        path: str,
        question: str = "question",
        answer: str = "answer",
        reward: str = "aspo_lightning.rewards.math.reward",
        system_prompt: str | None = None,
        chat: bool = True,
    ) -> None:
        super().__init__(reward, system_prompt, chat)
        self.path, self.question, self.answer = Path(path).expanduser(), question, answer

    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        if not self.path.is_file():
            raise ConfigError(f"The task file {self.path} doesn't exist. Give the path of a JSONL file.")
        empty = True
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{self.path}:{number} isn't JSON: {error}.") from error
            for key in (self.question, self.answer):
                if not isinstance(row, dict) or row.get(key) in (None, ""):
                    raise ConfigError(f"{self.path}:{number} has no {key!r}. Each line is an object with that key.")
            empty = False
            yield f"{self.path.name}/{number}", str(row[self.question]), {**row, "answer": row[self.answer]}
        if empty:
            raise ConfigError(f"The task file {self.path} is empty. It needs at least one line.")
