"""What is kept of an epoch's completions: ``rollouts/epoch_00007.jsonl.gz`` in a run's folder, a line for each."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

from aspo_lightning.errors import RunError
from aspo_lightning.run.disk import write_bytes

_NAME = re.compile(r"epoch_(\d+)\.jsonl\.gz")


class TokenRecord(TypedDict):
    """Of each token that the model sampled."""

    text: list[str]
    ratio: list[float]
    """Of policy to old policy, when the token was last trained."""
    entropy: list[float]
    """Of the policy, in nats."""


class RolloutRecord(TypedDict):
    """A completion, what it earned, and how it was trained."""

    prompt_id: str
    sample: int
    """Which completion of its prompt, from 0."""
    question: str
    completion: str
    reward: float
    rewards: dict[str, float]
    """The value of each reward function, by import path, before it is weighed; without those that failed."""
    advantage: float | None
    """None: it isn't trained on."""
    solved: bool
    truncated: bool
    failed: bool
    """Its reward hung, crashed or raised."""
    turns: int
    length: int
    """Tokens that the model sampled."""
    repetition_rate: float
    ratio: float | None
    """Mean over its tokens and passes. None: it isn't trained on."""
    clipped: float | None
    """Share of its tokens that left the trust region, over all passes."""
    tokens: TokenRecord | None
    """Only of the completions of one micro-batch, the last of the phase."""


def rollout_path(run: Path, epoch: int) -> Path:
    return run / "rollouts" / f"epoch_{epoch:05d}.jsonl.gz"


def rollout_files(run: Path) -> dict[int, Path]:
    """The files of a run by their epoch, in its order."""
    found = ((_NAME.fullmatch(path.name), path) for path in (run / "rollouts").glob("*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def write_rollouts(path: Path, records: Iterable[RolloutRecord]) -> None:
    """Writes a file, whole or not at all. The same records make the same bytes."""
    text = "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, gzip.compress(text.encode(), compresslevel=6, mtime=0))


def read_rollouts(path: Path) -> Iterator[RolloutRecord]:
    """The records of a file.

    Raises:
        RunError: if it is damaged.
    """
    try:
        with gzip.open(path, "rt") as lines:
            for line in lines:
                yield json.loads(line)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RunError(f"{path} is damaged: {' '.join(str(error).split())}. Remove it to see the others.") from error
