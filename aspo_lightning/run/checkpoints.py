"""Checkpoints that are written whole or not at all, know when they are damaged, and are read without running code."""

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch.types import Storage

from aspo_lightning.errors import ConfigError, RunError
from aspo_lightning.run.disk import SyncedFile, digest_path, file_digest, not_written, write_text
from aspo_lightning.types import State

METADATA = "meta.pt"  # Lightning's name for what isn't sharded in a sharded checkpoint

DIGESTS = "xxh3.json"  # in a sharded checkpoint: of all its files


Device = torch.device | str | dict[str, str] | Callable[[Storage, str], Storage]
"""Where tensors go, as ``torch.load`` takes it."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name in the same folder, flushes to disk, and renames; a digest goes beside it.

    Lightning's own also renames, but first holds the whole file in memory.
    """

    def save_checkpoint(self, checkpoint: State, path: str | Path, storage_options: object = None) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        crc32 = torch.serialization.get_crc32_options()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                left.unlink()  # of a run that was killed here
            torch.serialization.set_crc32_options(False)  # they take longer than the digest, which tells the same
            with SyncedFile(temporary) as file:
                torch.save(checkpoint, file)
            digest_path(path).unlink(missing_ok=True)  # of an older file of this name
            temporary.replace(path)
            write_text(digest_path(path), file.digest)
        except (OSError, RuntimeError) as error:
            # torch still ends a file that couldn't be written, and says what is wrong with that.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise not_written(path, cause) from error
        finally:
            torch.serialization.set_crc32_options(crc32)
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Device | None = None, weights_only: bool | None = None
    ) -> State:
        if Path(path).is_dir():
            raise ConfigError(
                f"The checkpoint {path} is a sharded one. Resume from it with --trainer.strategy fsdp2, on any number "
                "of ranks (--trainer.devices 1 too)."
            )
        check_whole(Path(path))
        return load(Path(path), map_location=map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        digest_path(Path(path)).unlink(missing_ok=True)


def check_whole(path: Path) -> None:
    """Checks a checkpoint (a file, or the folder of a sharded one) for damage, as far as it can be seen.

    Raises:
        ConfigError: if it doesn't exist.
        RunError: if it is damaged.
    """
    path = path.resolve()
    if not path.exists():
        raise ConfigError(f"The checkpoint {path} doesn't exist. --ckpt_path last takes the newest run's newest one.")
    try:
        if path.is_dir():
            digests: dict[str, str] = json.loads((path / DIGESTS).read_text()) if (path / DIGESTS).exists() else {}
            wrong = [name for name, digest in digests.items() if file_digest(path / name) != digest]
            reason = f"{wrong[0]} in it has changed since it was written" if wrong else None
        elif digest_path(path).exists():
            whole = file_digest(path) == digest_path(path).read_text()
            reason = None if whole else "it has changed since it was written"
        else:
            reason = None if zipfile.is_zipfile(path) else "its end is missing"
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error)
    if reason:
        raise RunError(
            f"The checkpoint {path} is damaged: {reason}. Resume from another; with the run's folder as --ckpt_path "
            "that is the newest whole one."
        )


def load(path: Path, *, map_location: Device = "cpu", mmap: bool = False) -> State:
    """What a file holds, if that is tensors and plain data: a checkpoint from a stranger can't run code.

    On the CPU unless ``map_location`` says otherwise, even where a GPU wrote it: all ranks of a machine read it.

    Raises:
        ConfigError: if it holds something else.
        RunError: if it is damaged.
    """
    try:
        content = torch.load(path, weights_only=True, map_location=map_location, mmap=mmap)
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        if match := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error)):
            raise ConfigError(
                f"{path} holds {match[1]}, and a checkpoint may hold nothing but tensors and plain data. If a callback "
                "of your own put it there, keep plain data in its state_dict."
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunError(f"{path} can't be read: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} isn't a checkpoint: it holds a {type(content).__name__}.")
    return content


TRAINED_AS = ("model_name_or_path", "lora_rank", "lora_alpha")


def metadata(checkpoint: Path) -> State:
    """What isn't sharded in a checkpoint of ``aspo fit``; all of one that isn't sharded, not read from the disk.

    Raises:
        ConfigError: if it isn't one.
        RunError: if it is damaged.
    """
    content = load(checkpoint / METADATA if checkpoint.is_dir() else checkpoint, mmap=True)
    settings = content.get("model")
    if not isinstance(settings, dict) or not {*TRAINED_AS, "dtype"} <= set(settings) or "global_step" not in content:
        raise ConfigError(f"{checkpoint} isn't a checkpoint of `aspo fit`: it doesn't say which model it is of.")
    return content


def trained_from(checkpoint: Path) -> State:
    """The settings of ``ASPOModule`` that a checkpoint's weights fit: the model, its dtype, the adapters.

    Raises:
        ConfigError: if it was not written by ``aspo fit``.
    """
    settings = metadata(checkpoint)["model"]
    return {**{name: settings[name] for name in TRAINED_AS}, "dtype": str(settings["dtype"]).removeprefix("torch.")}


def trained_steps(checkpoint: Path) -> int:
    """Optimizer steps up to a checkpoint."""
    return int(metadata(checkpoint)["global_step"])


def check_resumable(checkpoint: Path) -> None:
    """Raises ConfigError for a checkpoint that isn't from ``aspo fit``, or holds weights alone."""
    if "optimizer_states" not in metadata(checkpoint) and not checkpoint.is_dir():
        raise ConfigError(
            f"{checkpoint} holds weights alone, and no optimizer state: it can be evaluated and exported. Resume from "
            "one in the run's folder checkpoints."
        )


def check_between_phases(checkpoint: State) -> None:
    """Raises ConfigError for a checkpoint from which no run can be resumed: one that was written within an epoch."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    if epochs["started"] != epochs["processed"]:
        raise ConfigError(
            f"The checkpoint was written within epoch {epochs['processed']}, whose phase was sampled by weights that "
            "are gone. Resume from one that was written at the end of an epoch."
        )
