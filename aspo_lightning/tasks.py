"""Where prompts come from: procedural tasks, files, Hugging Face datasets, and mixtures of them."""

import gzip
import hashlib
import json
import math
import random
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from aspo_lightning.errors import ConfigError
from aspo_lightning.types import Prompt

Rewards = str | dict[str, float]
"""Import path of ``reward(completion: str, row: dict) -> float``, or several with their weights."""


class Task(ABC):
    """A source of problems, each with what its reward needs.

    Args:
        reward: import path of ``reward(completion: str, row: dict) -> float``, where 1.0 is a full solution; or a
            mapping of several to their weights, of which the first tells what is solved, and what is answered.
        environment: import path of ``environment(turns: list[str], row: dict) -> str | None``, which answers the
            model's turns so far, or ends the episode with None. Without one, a completion is one turn.
        system_prompt: put before each problem. None leaves it to the chat template.
        chat: put problems into the model's chat template, if its tokenizer has one; otherwise they are plain text
            that the model continues.
        thinking: switches the thinking mode of a chat template that has one (Qwen3). None leaves it to the template.
    """

    template = "{question}"
    """What the model is asked; ``{question}`` stands for the problem's text."""

    def __init__(
        self,
        reward: Rewards,
        environment: str | None = None,
        system_prompt: str | None = None,
        chat: bool = True,
        thinking: bool | None = None,
    ) -> None:
        self.rewards = {reward: 1.0} if isinstance(reward, str) else dict(reward)
        if not self.rewards:
            raise ConfigError("A task needs at least one reward; its mapping of rewards to weights is empty.")
        self.environment = environment
        self.system_prompt = system_prompt
        self.chat = chat
        self.has_levels = False
        self.template_options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
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
        tell_dropped(len(prompts) + repeats, len(prompts), "the same as an earlier one")
        return prompts

    def functions(self) -> set[str]:
        """Import paths of all that runs in the reward pool for this task."""
        return {*self.rewards, *([self.environment] if self.environment else [])}

    def _render(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt is not None else []
        text: Any = tokenizer.apply_chat_template(
            [*system, *messages], tokenize=False, add_generation_prompt=True, **self.template_options
        )
        return str(text)

    def _reply_frame(self, tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[str, str]:
        """What stands between a finished turn and the environment's reply, and between that and the next turn."""
        if not chat:
            return "\n", "\n"
        turn, reply = "\ue000", "\ue001"  # private-use characters: in no template
        contents = [("user", ""), ("assistant", turn), ("user", reply)]
        text = self._render(tokenizer, [{"role": role, "content": content} for role, content in contents])
        before, _, after = text.partition(turn)[2].partition(reply)
        # The turn's own end token is sampled, and so already there.
        return before.removeprefix(str(tokenizer.eos_token or "")), after


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


class Dataset(Task):
    """Problems from a file or a Hugging Face dataset.

    Columns are named by their path: ``reward_model.ground_truth``, ``prompt.0.content``.

    Args:
        path: a .jsonl (also .jsonl.gz) or .parquet file; one on the hub, ``hf://datasets/OWNER/NAME/FILE``; a folder
            saved by ``datasets``; or a name on the hub.
        question: column of the problem's text. Of several, the texts are put one below the other; all but the first
            may be missing in a row.
        answer: column of what the reward compares with, handed to it as ``row["answer"]``; of several, a list.
        id: column of a unique id. None: the row's number.
        level: column of a whole number, the row's difficulty for a curriculum of levels.
        subset: of a dataset on the hub.
        split: of a saved dataset or one on the hub.
        template: what the model is asked; ``{question}`` stands for the problem's text.
        between: keeps only rows in which a column is at least the first value and less than the second; by column.
            Dates are text, like 2025-02-01.
        reward, environment, system_prompt, chat, thinking: see Task.
    """

    def __init__(
        self,
        path: str,
        question: str | list[str] = "question",
        answer: str | list[str] = "answer",
        id: str | None = None,
        level: str | None = None,
        subset: str | None = None,
        split: str = "train",
        template: str = "{question}",
        between: dict[str, tuple[Any, Any]] | None = None,
        reward: Rewards = "aspo_lightning.rewards.math.reward",
        environment: str | None = None,
        system_prompt: str | None = None,
        chat: bool = True,
        thinking: bool | None = None,
    ) -> None:
        super().__init__(reward, environment, system_prompt, chat, thinking)
        if "{question}" not in template:
            raise ConfigError(
                f"A task's template is {template!r}; it must hold {{question}}, the place of the problem."
            )
        self.path, self.subset, self.split = path, subset, split
        self.question = [question] if isinstance(question, str) else question
        self.answer, self.id, self.level, self.template = answer, id, level, template
        self.has_levels = level is not None
        self.between = between or {}

    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
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
            inside = "".join(f" with {key} from {low} to {high}" for key, (low, high) in self.between.items())
            raise ConfigError(f"{self.path} has no rows{inside}: an empty task. A task needs at least one row.")

    def _inside(self, where: str, row: dict[str, Any]) -> bool:
        for key, (low, high) in self.between.items():
            value = _column(where, row, key)
            value = value.isoformat() if hasattr(value, "isoformat") else value
            try:
                if not low <= value < high:
                    return False
            except TypeError as error:
                raise ConfigError(
                    f"{where}: {key!r} is {value!r}, which can't be compared with {low!r} and {high!r} of between."
                ) from error
        return True

    def problem(self, where: str, number: int, row: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
        """(id, text, row for the reward) of a row. Raises ConfigError, which names ``where``, if it can't be used."""
        id = f"{Path(self.path).name}/{number}" if self.id is None else str(_filled(where, row, self.id))
        question, fields = self._problem(where, row)
        if self.level is not None:
            level = _column(where, row, self.level)
            if not isinstance(level, int):
                raise ConfigError(f"{where}: {self.level!r} is {level!r}; a level must be a whole number.")
            fields["level"] = level
        return id, question, {**row, **fields}

    def _problem(self, where: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The problem's text, and what is added to its row for the reward."""
        texts = [_filled(where, row, self.question[0])]
        texts += [_column(where, row, key) for key in self.question[1:]]
        for key, text in zip(self.question, texts, strict=True):
            if text is not None and not isinstance(text, str):
                raise ConfigError(f"{where}: {key!r} is a {type(text).__name__}; a problem's text must be a string.")
        if isinstance(self.answer, str):
            answer = _filled(where, row, self.answer)
        else:
            answer = [value for key in self.answer if not _is_empty(value := _column(where, row, key))]
            if not answer:
                raise ConfigError(
                    f"{where}: all of {', '.join(map(repr, self.answer))} are empty. A row needs an answer."
                )
        return "\n\n".join(text for text in texts if text), {"answer": answer}


class MultipleChoice(Dataset):
    """Problems with options, shown as lettered lines; the answer is a letter.

    Args:
        options: columns of the options, the right one first (they are shuffled, the same way each time); or the
            column of a list of options.
        answer: with a list of options, the column of the right one's letter or index.
        path, question, id, level, subset, split, template, between, reward, environment, system_prompt, chat,
            thinking: see Dataset.
    """

    def __init__(
        self,
        path: str,
        options: str | list[str],
        question: str | list[str] = "question",
        answer: str | None = None,
        id: str | None = None,
        level: str | None = None,
        subset: str | None = None,
        split: str = "train",
        template: str = "{question}\n\nEnd with the letter of the right option in \\boxed{}.",
        between: dict[str, tuple[Any, Any]] | None = None,
        reward: Rewards = "aspo_lightning.rewards.choice.reward",
        environment: str | None = None,
        system_prompt: str | None = None,
        chat: bool = True,
        thinking: bool | None = None,
    ) -> None:
        if isinstance(options, str) == (answer is None):
            raise ConfigError(
                f"MultipleChoice.options is {options!r} and answer is {answer!r}. Give either a list of columns, the "
                "right one first, and no answer; or the column of all options, and that of the answer."
            )
        keys = options[0] if answer is None else answer
        super().__init__(
            path,
            question,
            keys,
            id,
            level,
            subset,
            split,
            template,
            between,
            reward,
            environment,
            system_prompt,
            chat,
            thinking,
        )
        self.options = options

    def _problem(self, where: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
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
            digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
            random.Random(int.from_bytes(digest, "little")).shuffle(order)
            options, right = [options[i] for i in order], order.index(0)
        lines = [f"{_letter(i)}. {str(option).strip()}" for i, option in enumerate(options)]
        return "\n".join([f"{question}\n", *lines]), {"answer": _letter(right), "options": options}


class Mixture(Task):
    """Several tasks together. A prompt that several of them have is the first one's.

    Args:
        tasks: by a name that goes before their ids.
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
                raise ConfigError(f"Mixture.weights.{name} is {weight}; allowed are numbers from 0 on.")

    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
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
            tell_dropped(len(found), len(prompts), f"{name} shares them with tasks before it in the mixture")
            taken.update(p.prompt_ids for p in prompts)
            whole = int(weight)
            for turn in range(whole):
                mixed += [p.renamed(f"{p.id}#{turn}") if turn else p for p in prompts]
            part = random.Random(f"{self.seed}/{name}").sample(prompts, round((weight - whole) * len(prompts)))
            mixed += [p.renamed(f"{p.id}#{whole}") if whole else p for p in part]
        return mixed

    def functions(self) -> set[str]:
        return {function for task in self.tasks.values() for function in task.functions()}


def without_held_out(prompts: Sequence[Prompt], evaluations: Iterable[Sequence[Prompt]]) -> list[Prompt]:
    """The prompts whose problem is in none of the evaluations, whatever template or system prompt is around it."""
    taken = {" ".join(words(p.question)) for evaluation in evaluations for p in evaluation}
    left = [p for p in prompts if " ".join(words(p.question)) not in taken]
    tell_dropped(len(prompts), len(left), "their problems are held out for evaluation")
    return left


def without_long(prompts: Sequence[Prompt], most: int, task: str) -> list[Prompt]:
    """The prompts of at most so many tokens. Raises ConfigError, which names the task, if there are none."""
    short = [p for p in prompts if len(p.prompt_ids) <= most]
    tell_dropped(len(prompts), len(short), f"over {most} tokens")
    if not short:
        lengths = [len(p.prompt_ids) for p in prompts]
        raise ConfigError(
            f"All {len(prompts)} prompts of {task} are over data.max_prompt_length {most}: the shortest has "
            f"{min(lengths)} tokens. Raise it."
            if lengths
            else f"{task} has no prompts: an empty task. A task needs at least one."
        )
    return short


def tell_dropped(count: int, kept: int, why: str) -> None:
    """Shows how many of ``count`` prompts go."""
    if kept < count:
        rank_zero_info(f"Dropped {count - kept} of {count} prompts: {why}")


def words(question: str) -> list[str]:
    """The words and signs of a problem's text. Case, white space and the spacing of punctuation make no difference."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", question.lower())


def read_rows(path: str, subset: str | None = None, split: str = "train") -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yields (where, number, row) of a .jsonl or .parquet file, a saved dataset or one on the hub; rows count from 1.

    Raises:
        ConfigError: if it can't be read, with the file and the row.
    """
    file = _hub_file(path) if path.startswith("hf://") else Path(path).expanduser()
    if file.suffix in (".jsonl", ".json", ".gz", ".parquet"):
        if not file.is_file():
            raise ConfigError(f"The task file {file} doesn't exist. Give the path of a .jsonl or .parquet file.")
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    else:
        rows = _hub_rows(path, subset, split)
    for number, row in rows:
        where = f"{path}:{number}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is a {type(row).__name__}. Each row is an object with named columns.")
        yield where, number, row


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}:{number} isn't UTF-8 text ({error.reason}).") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}:{number} isn't JSON: {error}. Each line is an object.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file} can't be read behind line {number}: {error}") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{file} can't be read behind row {number}: {' '.join(str(error).split())[:200]}") from error


def _hub_file(path: str) -> Path:
    """A file of a dataset on the hub, downloaded unless it is in the cache."""
    from huggingface_hub import hf_hub_download

    owner, name, *file = path.removeprefix("hf://datasets/").split("/")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", "/".join(file), repo_type="dataset"))
    except Exception as error:  # of many kinds: no network, no such name, gated
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"The file {path!r} can't be loaded from the hub: {reason}") from error


def _hub_rows(path: str, subset: str | None, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        if Path(path).expanduser().is_dir():
            dataset: Any = datasets.load_from_disk(str(Path(path).expanduser()))
            dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
        else:
            dataset = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # of many kinds: no network, no such name, no such split, gated
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"The dataset {path!r} (subset {subset!r}, split {split!r}) can't be loaded: {reason}"
        ) from error
    yield from enumerate(dataset, start=1)


def _column(where: str, row: Any, path: str) -> Any:
    value = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ConfigError(f"{where} has no {path!r}. Its columns are {', '.join(map(str, row))}.")
    return value


def _filled(where: str, row: dict[str, Any], path: str) -> Any:
    value = _column(where, row, path)
    if _is_empty(value):
        raise ConfigError(f"{where}: {path!r} is empty ({value!r}).")
    return value


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, (list, dict)) and not value)


def _option_index(answer: Any) -> int | None:
    """Of a letter, or of a number (numbers in text count from 1, as letters do)."""
    if isinstance(answer, int):
        return answer
    text = str(answer).strip().upper()
    if len(text) == 1 and "A" <= text <= "Z":
        return ord(text) - ord("A")
    return int(text) - 1 if text.isdigit() and int(text) > 0 else None


def _letter(index: int) -> str:
    return chr(ord("A") + index)
