"""Tasks from the rows of a file or a hub dataset."""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any

from aspo_lightning.errors import ConfigError
from aspo_lightning.tasks.base import Rewards, Task
from aspo_lightning.tasks.rows import read_rows
from aspo_lightning.types import Row


@dataclass
class Dataset(Task):
    """Problems from a file or a Hugging Face dataset.

    Columns are named by their path: ``reward_model.ground_truth``, ``prompt.0.content``.
    """

    path: str
    """A .jsonl (also .jsonl.gz) or .parquet file; one on the hub, ``hf://datasets/OWNER/NAME/FILE``; a folder saved by
    ``datasets``; or a name on the hub."""
    question: str | list[str] = "question"
    """Column of the problem's text. Of several, the texts are put one below the other; all but the first may be missing
    in a row."""
    answer: str | list[str] = "answer"
    """Column of what the reward compares with, handed to it as ``row["answer"]``; of several, a list."""
    id: str | None = None
    """Column of a unique id. None: the row's number."""
    level: str | None = None
    """Column of a whole number, the row's difficulty for a curriculum of levels."""
    subset: str | None = None
    """Subset of a dataset on the hub."""
    split: str = "train"
    """Split of a saved dataset or one on the hub."""
    template: str = "{question}"
    """What the model is asked; ``{question}`` stands for the problem's text."""
    between: dict[str, tuple[Any, Any]] | None = None
    """Keeps only rows in which a column is at least the first value and less than the second; by column. Dates are
    text, like 2025-02-01."""
    reward: Rewards = field(default="aspo_lightning.rewards.math.reward", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.question:
            raise ConfigError("Dataset.question is an empty list. Name the column of the problem's text.")
        if "{question}" not in self.template:
            raise ConfigError(
                f"A task's template is {self.template!r}; it must hold {{question}}, the place of the problem."
            )
        self.has_levels = self.level is not None

    def rows(self) -> Iterator[tuple[str, str, Row]]:
        seen: dict[str, str] = {}
        for where, number, row in read_rows(self.path, self.subset, self.split):
            if not self._inside(where, row):
                continue
            id, question, row = self.problem(where, number, row)
            if id in seen:
                raise ConfigError(f"{where} has the id {id!r}, which {seen[id]} has too. Ids must be unique.")
            seen[id] = where
            yield id, question, row
        if not seen:
            inside = "".join(f" with {key} from {low} to {high}" for key, (low, high) in (self.between or {}).items())
            raise ConfigError(f"{self.path} has no rows{inside}: an empty task. A task needs at least one row.")

    def _inside(self, where: str, row: Row) -> bool:
        for key, (low, high) in (self.between or {}).items():
            value = _column(where, row, key)
            value = value.isoformat() if isinstance(value, (date, time)) else value
            try:
                if not (low <= value and high > value):
                    return False
            except TypeError as error:
                raise ConfigError(
                    f"{where}: {key!r} is {value!r}, which can't be compared with {low!r} and {high!r} of between."
                ) from error
        return True

    def problem(self, where: str, number: int, row: Row) -> tuple[str, str, Row]:
        """(id, text, row for the reward) of a row. Raises ConfigError, which names ``where``, if it can't be used."""
        id = f"{Path(self.path).name}/{number}" if self.id is None else str(_filled(where, row, self.id))
        question, fields = self._problem(where, row)
        check_text(where, [id, question, fields])
        if self.level is not None:
            level = _column(where, row, self.level)
            if not isinstance(level, int):
                raise ConfigError(f"{where}: {self.level!r} is {level!r}; a level must be a whole number.")
            fields["level"] = level
        return id, question, {**row, **fields}

    def _problem(self, where: str, row: Row) -> tuple[str, Row]:
        """The problem's text, and what is added to its row for the reward."""
        texts = []
        for i, key in enumerate([self.question] if isinstance(self.question, str) else self.question):
            text = _column(where, row, key) if i else _filled(where, row, key)
            if isinstance(text, str):
                texts.append(text)
            elif text is not None:
                raise ConfigError(f"{where}: {key!r} is a {type(text).__name__}; a problem's text must be a string.")
        if isinstance(self.answer, str):
            answer: object = _filled(where, row, self.answer)
        else:
            answer = [value for key in self.answer if not _is_empty(value := _column(where, row, key))]
            if not answer:
                raise ConfigError(
                    f"{where}: all of {', '.join(map(repr, self.answer))} are empty. A row needs an answer."
                )
        return "\n\n".join(text for text in texts if text), {"answer": answer}


@dataclass
class MultipleChoice(Dataset):
    """Problems with options, shown as lettered lines; the answer is a letter."""

    options: str | list[str] = field(kw_only=True)
    """Columns of the options, the right one first (they are shuffled, the same way each time); or the column of a list
    of options."""
    answer: str | None = None  # type: ignore[assignment]  # a dataset always has one
    """With a list of options, the column of the right one's letter or index."""
    template: str = "{question}\n\nEnd with the letter of the right option in \\boxed{}."
    reward: Rewards = field(default="aspo_lightning.rewards.choice.reward", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.options, str) == (self.answer is None):
            raise ConfigError(
                f"MultipleChoice.options is {self.options!r} and answer is {self.answer!r}. Give either a list of "
                "columns, the right one first, and no answer; or the column of all options, and that of the answer."
            )
        if self.answer is None:
            self.answer = self.options[0]

    def _problem(self, where: str, row: Row) -> tuple[str, Row]:
        question, fields = super()._problem(where, row)
        if isinstance(self.options, str):
            options = _filled(where, row, self.options)
            right = _option_index(fields["answer"])
            if not isinstance(options, list) or right is None or not 0 <= right < len(options):
                raise ConfigError(
                    f"{where}: {self.answer!r} is {fields['answer']!r}, which is none of the options {options!r}."
                )
        else:
            options = [_filled(where, row, key) for key in self.options]
            order = list(range(len(options)))
            digest = hashlib.blake2b(question.encode(errors="surrogatepass"), digest_size=8).digest()
            random.Random(int.from_bytes(digest, "little")).shuffle(order)
            options, right = [options[i] for i in order], order.index(0)
        lines = [f"{_letter(i)}. {str(option).strip()}" for i, option in enumerate(options)]
        return "\n".join([f"{question}\n", *lines]), {"answer": _letter(right), "options": options}


def _column(where: str, row: Row, path: str) -> object:
    value: object = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ConfigError(f"{where} has no {path!r}. Its columns are {', '.join(map(str, row))}.")
    return value


def _filled(where: str, row: Row, path: str) -> object:
    value = _column(where, row, path)
    if _is_empty(value):
        raise ConfigError(f"{where}: {path!r} is empty ({value!r}).")
    return value


def check_text(where: str, values: Sequence[object]) -> None:
    """Raises ConfigError for half of a surrogate pair, which JSON lets through: no tokenizer and no file takes it."""
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} has half of a surrogate pair ({error.object[error.start]!r}): no text.") from error


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, (list, dict)) and not value)


def _option_index(answer: object) -> int | None:
    """The index that a letter or a number stands for (numbers in text count from 1, as letters do)."""
    if isinstance(answer, int):
        return answer
    text = str(answer).strip().upper()
    if len(text) == 1 and "A" <= text <= "Z":
        return ord(text) - ord("A")
    return int(text) - 1 if text.isdigit() and int(text) > 0 else None


def _letter(index: int) -> str:
    return chr(ord("A") + index)
