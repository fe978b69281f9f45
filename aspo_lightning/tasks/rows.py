"""Rows of JSONL and Parquet files, saved datasets and the hub."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from aspo_lightning.errors import ConfigError
from aspo_lightning.types import Row


def read_rows(path: str, subset: str | None = None, split: str = "train") -> Iterator[tuple[str, int, Row]]:
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


def _json_rows(file: Path) -> Iterator[tuple[int, object]]:
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
        raise ConfigError(f"{file} can't be read after line {number}: {error}") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, object]]:
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
        raise ConfigError(f"{file} can't be read after row {number}: {' '.join(str(error).split())[:200]}") from error


def _hub_file(path: str) -> Path:
    """A file of a dataset on the hub, downloaded unless it is in the cache."""
    from huggingface_hub import hf_hub_download

    if (parts := re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+\.(?:jsonl|json|gz|parquet))", path)) is None:
        raise ConfigError(f"The file {path!r} must be like hf://datasets/OWNER/NAME/FILE.jsonl, or .parquet.")
    try:
        return Path(hf_hub_download(parts[1], parts[2], repo_type="dataset"))
    except Exception as error:  # of many kinds: no network, no such name, gated
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"The file {path!r} can't be loaded from the hub: {reason}") from error


def _hub_rows(path: str, subset: str | None, split: str) -> Iterator[tuple[int, object]]:
    import datasets

    try:
        if Path(path).expanduser().is_dir():
            saved = datasets.load_from_disk(str(Path(path).expanduser()))
            rows: Iterable[object] = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # of many kinds: no network, no such name, no such split, gated
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"The dataset {path!r} (subset {subset!r}, split {split!r}) can't be loaded: {reason}"
        ) from error
    yield from enumerate(rows, start=1)
