"""Cleans a dataset into a JSONL file of id, question and answer: bad rows, over-long prompts and duplicates go.

python scripts/prepare_data.py --source agentica-org/DeepScaleR-Preview-Dataset --question problem --out math.jsonl

Killed and started again with the same arguments, it resumes, and writes the same file as if it had never stopped.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from jsonargparse import auto_cli
from tqdm import tqdm

from aspo_lightning.errors import ConfigError
from aspo_lightning.tasks import Dataset
from aspo_lightning.tasks.base import words
from aspo_lightning.tasks.dataset import check_text
from aspo_lightning.tasks.rows import read_rows

SAVE_EVERY = 500  # rows
SHINGLE = 3  # words


class Duplicates:
    """Knows the questions seen so far, by their words.

    Near is a Jaccard similarity of at least ``near`` between the sets of word triples. LSH finds the candidates.
    """

    def __init__(self, near: float) -> None:
        self.near = near
        self.exact: set[bytes] = set()
        self.shingles: list[np.ndarray] = []
        self.lsh = MinHashLSH(near, 128, weights=(0.1, 0.9)) if near < 1 else None

    def add(self, question: str) -> str | None:
        """Why the question is a duplicate; None, and it is remembered, if it is new."""
        found = words(question)
        key = hashlib.blake2b(" ".join(found).encode(), digest_size=16).digest()
        if key in self.exact:
            return "exact duplicate"
        self.exact.add(key)
        if self.lsh is not None:
            texts = {" ".join(found[i : i + SHINGLE]).encode() for i in range(max(1, len(found) - SHINGLE + 1))}
            signature = MinHash(num_perm=128)
            signature.update_batch(list(texts))
            hashes = np.array([int.from_bytes(hashlib.blake2b(t, digest_size=8).digest()) for t in texts], np.uint64)
            if any(jaccard(hashes, self.shingles[i]) >= self.near for i in self.lsh.query(signature)):
                return "near duplicate"
            self.lsh.insert(len(self.shingles), signature)
            self.shingles.append(hashes)
        return None


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The similarity of two sets: how much of what is in either is in both."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def main(
    source: str,
    out: Path,
    question: str | list[str] = "question",
    answer: str | list[str] = "answer",
    id: str | None = None,
    subset: str | None = None,
    split: str = "train",
    model: str | None = None,
    max_prompt_length: int = 2048,
    near: float = 0.9,
    keep: list[str] | None = None,
    drop_if: list[str] | None = None,
    held_out: list[Path] | None = None,
) -> None:
    """Cleans a dataset.

    Args:
        source: a .jsonl or .parquet file, a folder saved by datasets, or a name on the hub.
        out: the JSONL file to write.
        question: column of the problem's text, or several.
        answer: column of what the reward compares with, or several.
        id: column of a unique id. None: the row's number.
        subset: of a dataset on the hub.
        split: of a saved dataset or one on the hub.
        model: whose tokenizer measures prompts. None: they aren't measured.
        max_prompt_length: tokens; longer prompts go.
        near: similarity (0 to 1) from which two questions are near duplicates. 1: only exact ones go.
        keep: further columns to write, such as the time_limit that the code reward reads.
        drop_if: columns; a row where one of them holds something goes.
        held_out: JSONL files with a column ``question``; what is a duplicate of theirs goes.
    """
    if not 0 < near <= 1:
        raise ConfigError(f"near is {near}; it must be above 0 and at most 1.")
    if out.suffix not in (".jsonl", ".json"):
        raise ConfigError(f"--out is {out}; its name must end with .jsonl, which is what is written.")
    settings = {key: str(value) for key, value in locals().items() if key != "out"}
    task = Dataset(source, question, answer, id, subset=subset, split=split)
    tokenizer = None
    if model:
        from aspo_lightning.policy.hub import load_tokenizer  # transformers takes seconds

        tokenizer = load_tokenizer(model)
    duplicates = Duplicates(near)
    for file in held_out or []:
        for _, _, row in read_rows(str(file)):
            duplicates.add(str(row["question"]))
    state_path = out.with_name(out.name + ".progress")
    state = load_state(out, state_path, settings)
    dropped, ids = Counter(state["dropped"]), set()
    if state["read"]:
        with out.open("r+b") as file:
            file.truncate(state["bytes"])  # what was written after the last save is written again
        for _, _, row in read_rows(str(out)):
            duplicates.add(row["question"])
            ids.add(row["id"])
        print(f"Resuming after row {state['read']}")

    with out.open("ab") as file:

        def save() -> None:
            file.flush()
            os.fsync(file.fileno())
            state.update(bytes=file.tell(), dropped=dict(dropped))
            temporary = state_path.with_name(state_path.name + ".tmp")
            temporary.write_text(json.dumps(state))
            temporary.replace(state_path)

        save()  # from the first byte on, the file is known as one that can be resumed
        rows = read_rows(source, subset, split)
        for index, (where, number, row) in enumerate(tqdm(rows, desc="prepare", unit="row")):
            if index < state["read"]:
                continue
            kept, reason = clean(task, where, number, row, keep or [], drop_if or [])
            if kept is not None and kept["id"] in ids:
                reason = "id taken"
            elif kept is not None and tokenizer is not None:
                length = len(tokenizer(kept["question"]).input_ids)
                reason = "over-long prompt" if length > max_prompt_length else None
            reason = reason or duplicates.add(kept["question"])  # type: ignore[index]
            if reason:
                dropped[reason] += 1
            else:
                assert kept is not None
                ids.add(kept["id"])
                file.write(json.dumps(kept, ensure_ascii=False).encode() + b"\n")
            state["read"] = index + 1
            if state["read"] % SAVE_EVERY == 0:
                save()
        state["done"] = True
        save()
    report(out, state["read"], len(ids), dropped)


def clean(
    task: Dataset, where: str, number: int, row: dict[str, Any], keep: list[str], drop_if: list[str]
) -> tuple[dict[str, Any] | None, str | None]:
    """(the row to keep, None) or (None, why it goes)."""
    for column in [*keep, *drop_if]:
        if column not in row:
            raise ConfigError(f"{where} has no {column!r}. Its columns are {', '.join(row)}.")
    for column in drop_if:
        if row[column]:
            return None, f"has {column}"
    try:
        id, question, full = task.problem(where, number, row)
        kept = {key: row[key] for key in keep}
        check_text(where, [kept])
    except ConfigError:
        return None, "bad row"
    return {"id": id, "question": question, "answer": full["answer"], **kept}, None


def load_state(out: Path, state_path: Path, settings: dict[str, str]) -> dict[str, Any]:
    if not state_path.exists():
        if out.exists():
            raise ConfigError(f"{out} exists and isn't from an interrupted run. Choose another name, or remove it.")
        return {"settings": settings, "read": 0, "bytes": 0, "dropped": {}, "done": False}
    state = json.loads(state_path.read_text())
    if changed := sorted(k for k in settings if state["settings"].get(k) != settings[k]):
        raise ConfigError(f"{out} was begun with other values of {', '.join(changed)}. Use those, or another name.")
    if state["done"]:
        raise ConfigError(f"{out} is finished. Remove it and {state_path.name} to make it again.")
    return dict(state)


def report(out: Path, read: int, kept: int, dropped: Counter[str]) -> None:
    print(f"{read} rows read, {kept} kept in {out}")
    for reason, count in dropped.most_common():
        print(f"{count:8d} dropped: {reason}")


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except ConfigError as error:
        sys.exit(f"prepare_data: error: {error}")
