"""What a task is: where prompts come from, and what their rewards are."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from aspo_lightning.errors import ConfigError
from aspo_lightning.types import Prompt, Row

Rewards = str | dict[str, float]
"""Import path of ``reward(completion: str, row: dict) -> float``, or several with their weights."""


@dataclass(kw_only=True, eq=False, repr=False)  # a mixture is a task without these settings
class Task(ABC):
    """A source of problems, each with what its reward needs."""

    reward: Rewards
    """Import path of ``reward(completion: str, row: dict) -> float``, where 1.0 is a full solution; or a mapping of
    several to their weights, of which the first says what is solved, and what is answered."""
    environment: str | None = None
    """Import path of ``environment(turns: list[str], row: dict) -> str | None``, which replies to the model's turns so
    far, or ends the episode with None. Without one, a completion is one turn."""
    system_prompt: str | None = None
    """Put before each problem. None leaves it to the chat template."""
    chat: bool = True
    """Put problems into the model's chat template, if its tokenizer has one; otherwise they are plain text that the
    model continues."""
    thinking: bool | None = None
    """Switches the thinking mode of a chat template that has one (Qwen3). None leaves it to the template."""

    template = "{question}"
    """What the model is asked; ``{question}`` stands for the problem's text."""
    has_levels = False
    """Whether each row has its level."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("A task needs at least one reward; its mapping of rewards to weights is empty.")

    @property
    def rewards(self) -> dict[str, float]:
        """The weight of each reward, by its import path."""
        return {self.reward: 1.0} if isinstance(self.reward, str) else dict(self.reward)

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, str, Row]]:
        """Yields (id, question, row); ids are unique and stable. ``row["level"]`` is its level, if the task has levels.

        The question is the problem's text, without the template.

        Raises:
            ConfigError: for a row that can't be used; the message says which.
        """

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """The problems, ready to be sampled from. Of rows that make the same prompt the first is kept."""
        chat = self.chat and tokenizer.chat_template is not None
        before_reply, after_reply = self._reply_frame(tokenizer, chat) if self.environment else ("", "")
        prompts, texts, repeats = [], set(), 0
        for id, question, row in self.rows():
            text = self.template.replace("{question}", question)
            if chat:
                text = self._render(tokenizer, [{"role": "user", "content": text}])
            elif self.system_prompt:
                text = f"{self.system_prompt}\n\n{text}"
            if text in texts:
                repeats += 1
                continue
            texts.add(text)
            ids = tokenizer(text, add_special_tokens=not chat).input_ids  # a template wrote the special tokens itself
            prompts.append(
                Prompt(
                    id,
                    tuple(ids),
                    text,
                    question,
                    self.rewards,
                    row,
                    level=row["level"] if self.has_levels else 0,
                    environment=self.environment,
                    before_reply=before_reply,
                    after_reply=after_reply,
                )
            )
        log_dropped(len(prompts) + repeats, len(prompts), "the same as an earlier one")
        return prompts

    def functions(self) -> set[str]:
        """Import paths of all that runs in the reward pool for this task."""
        return {*self.rewards, *([self.environment] if self.environment else [])}

    def _render(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt is not None else []
        options: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return str(
            tokenizer.apply_chat_template([*system, *messages], tokenize=False, add_generation_prompt=True, **options)
        )

    def _reply_frame(self, tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[str, str]:
        """What comes between a finished turn and the environment's reply, and between that and the next turn."""
        if not chat:
            return "\n", "\n"
        turn, reply = "\ue000", "\ue001"  # private-use characters: in no template
        contents = [("user", ""), ("assistant", turn), ("user", reply)]
        text = self._render(tokenizer, [{"role": role, "content": content} for role, content in contents])
        before, _, after = text.partition(turn)[2].partition(reply)
        # The turn's own end token is sampled, and so already there.
        return before.removeprefix(str(tokenizer.eos_token or "")), after


def training_prompts(prompts: Sequence[Prompt], evaluations: Iterable[Sequence[Prompt]]) -> list[Prompt]:
    """Those whose problem is in none of the evaluations, whatever template or system prompt is around it."""
    taken = {" ".join(words(p.question)) for evaluation in evaluations for p in evaluation}
    left = [p for p in prompts if " ".join(words(p.question)) not in taken]
    log_dropped(len(prompts), len(left), "their problems are held out for evaluation")
    return left


def without_long(prompts: Sequence[Prompt], most: int, task: str) -> list[Prompt]:
    """The prompts of at most this many tokens. Raises ConfigError, which names the task, if there are none."""
    short = [p for p in prompts if len(p.prompt_ids) <= most]
    log_dropped(len(prompts), len(short), f"over {most} tokens")
    if not short:
        lengths = [len(p.prompt_ids) for p in prompts]
        raise ConfigError(
            f"All {len(prompts)} prompts of {task} are over data.max_prompt_length {most}: the shortest has "
            f"{min(lengths)} tokens. Raise it."
            if lengths
            else f"{task} has no prompts: an empty task. A task needs at least one."
        )
    return short


def log_dropped(count: int, kept: int, why: str) -> None:
    """Logs how many of ``count`` prompts are dropped, and why."""
    if kept < count:
        rank_zero_info(f"Dropped {count - kept} of {count} prompts: {why}")


def words(question: str) -> list[str]:
    """The words and signs of a problem's text. Case, white space and the spacing of punctuation make no difference."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", question.lower())
