"""The completions of an epoch as the page holds them: which ones, how much of each, and the weights of their tokens."""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aspo_lightning.errors import RunError
from aspo_lightning.objectives import Objective
from aspo_lightning.run.rollout_files import RolloutRecord, TokenRecord, read_rollouts
from aspo_lightning.view.weights import Standout, Weighed, standout, weigh

MAX_CHARACTERS = 20_000
"""Of a text. The page says how many are missing."""
MAX_TOKENS = 1_000
"""Of a completion, around the one that ASPO weighs most differently from GRPO."""

# Shown by their pictures, ␀ for NUL, since a browser shows nothing for most of them.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


@dataclass
class Epoch:
    """The completions of an epoch, as JSON, and the means of all that its file holds."""

    page: dict[str, object]
    means: dict[str, float]
    """By TensorBoard tag."""


def read_epoch(path: Path, limit: int, by: Mapping[str, Objective]) -> Epoch:
    """Reads a file of completions.

    Args:
        path: the file.
        limit: how many completions the page takes.
        by: what weighs the tokens, ASPO and GRPO first.

    Raises:
        RunError: if it is damaged.
    """
    records: list[RolloutRecord] = []
    pages: list[dict[str, object]] = []
    try:
        for record in read_rollouts(path):
            check_tokens(record["tokens"])
            pages.append(page_record(len(pages) + 1, record))
            records.append({**record, "question": "", "completion": ""})  # those can be long, and the page has them
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RunError(f"{path} is damaged: line {len(pages) + 1} isn't a completion ({error!r}).") from error
    weighed = [weigh(record, by) for record in records]
    found = standout(weighed)
    chosen = choose(records, limit, found)
    page = {
        "file": f"{path.parent.name}/{path.name}",
        "total": len(records),
        "standout": found and found._asdict() | {"completion": chosen.index(found.completion)},
        "completions": [{**pages[n], "tokens": page_tokens(records[n]["tokens"], weighed[n])} for n in chosen],
    }
    return Epoch(page, means(records))


def check_tokens(tokens: TokenRecord | None) -> None:
    """Raises ValueError or TypeError if there isn't a number of each kind for each token."""
    if tokens is not None:
        numbers = [[float(value) for value in values] for values in (tokens["ratio"], tokens["entropy"])]
        if not len(tokens["text"]) == len(numbers[0]) == len(numbers[1]):
            raise ValueError("its tokens and their ratios aren't as many")


def choose(records: Sequence[RolloutRecord], limit: int, found: Standout | None) -> list[int]:
    """Which completions the page takes, ascending.

    That with ``found``, the three worst, then, until half are taken, those with tokens; then the worst, the best and
    the longest in turn.
    """
    everyone = range(len(records))
    worst = sorted(everyone, key=lambda n: records[n]["reward"])
    best = sorted(everyone, key=lambda n: -records[n]["reward"])
    longest = sorted(everyone, key=lambda n: -records[n]["length"])
    first = [*([found.completion] if found else []), *worst[:3]]
    first += [n for n in everyone if records[n]["tokens"]][: limit // 2]
    in_turn = itertools.chain(first, *zip(worst, best, longest, strict=True))
    return sorted(itertools.islice(dict.fromkeys(in_turn), limit))


def means(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """What TensorBoard would have of an epoch, as far as its completions say it."""
    values: dict[str, list[float]] = {
        "rollout/reward": [r["reward"] for r in records],
        "rollout/accuracy": [r["solved"] for r in records],
        "rollout/length": [r["length"] for r in records],
        "rollout/truncated_fraction": [r["truncated"] for r in records],
        "rollout/repetition_rate": [r["repetition_rate"] for r in records],
    }
    return {tag: statistics.fmean(of_tag) for tag, of_tag in values.items() if of_tag}


def page_record(line: int, record: RolloutRecord) -> dict[str, object]:
    """A completion as JSON, without its tokens."""
    return {
        "line": line,
        "prompt_id": visible(record["prompt_id"]),
        "sample": int(record["sample"]),
        "question": visible(record["question"][:MAX_CHARACTERS]),
        "completion": visible(record["completion"][:MAX_CHARACTERS]),
        "missing": {
            "question": max(0, len(record["question"]) - MAX_CHARACTERS),
            "completion": max(0, len(record["completion"]) - MAX_CHARACTERS),
        },
        "rewards": {visible(name): number_or_none(value) for name, value in record["rewards"].items()},
        "reward": number_or_none(record["reward"]),
        "advantage": number_or_none(record["advantage"]),
        "repetition_rate": number_or_none(record["repetition_rate"]),
        "ratio": number_or_none(record["ratio"]),
        "clipped": number_or_none(record["clipped"]),
        "solved": bool(record["solved"]),
        "truncated": bool(record["truncated"]),
        "failed": bool(record["failed"]),
        "turns": int(record["turns"]),
        "length": int(record["length"]),
    }


def page_tokens(tokens: TokenRecord | None, weighed: Weighed) -> dict[str, object] | None:
    """The tokens of a completion as JSON, at most ``MAX_TOKENS``; None if they have no weights."""
    if tokens is None or not weighed:
        return None
    found = standout([weighed])
    total = len(tokens["text"])
    first = max(0, min((found.token if found else 0) - MAX_TOKENS // 2, total - MAX_TOKENS))
    window = slice(first, first + MAX_TOKENS)
    return {
        "first": first,
        "total": total,
        "text": [visible(text) for text in tokens["text"][window]],
        "ratio": [number_or_none(value) for value in tokens["ratio"][window]],
        "entropy": [number_or_none(value) for value in tokens["entropy"][window]],
        "weights": {
            name: {
                "weight": [number_or_none(value) for value in of.weights[window].tolist()],
                "clipped": of.clipped[window].nonzero().flatten().tolist(),
                "dual_clipped": of.dual_clipped[window].nonzero().flatten().tolist(),
            }
            for name, of in weighed.items()
        },
    }


def visible(text: str) -> str:
    """Text with pictures for control characters, and without halves of surrogate pairs."""
    return re.sub(r"[\ud800-\udfff]", "\ufffd", text).translate(_CONTROLS)


def number_or_none(value: float | None) -> float | None:
    """Five significant digits; None for what JSON has no number for."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None
