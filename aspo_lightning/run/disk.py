"""Files that are written whole or not at all."""

import fcntl
import io
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import xxhash

from aspo_lightning.errors import ConfigError, RunError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


_AT_ONCE = 1 << 25
"""Bytes from one flush to the next."""


class SyncedFile(io.FileIO):
    """A new file that has reached the disk when it is closed without an error, and knows its digest.

    What is written goes to the disk on the way and stays in no cache: the pages of a system's cache can cost more than
    the disk (4.1 s for 1.6 GB on a virtual machine, 1.0 s without them).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._digest = xxhash.xxh3_128()
        self._synced = 0

    @property
    def digest(self) -> str:
        """As ``file_digest`` gives it for what has been written."""
        return self._digest.hexdigest()

    def write(self, content: "ReadableBuffer") -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        self._digest.update(left)
        while left:
            left = left[super().write(left[:_AT_ONCE]) :]
            if self.tell() - self._synced >= _AT_ONCE:
                self._sync()
        return size

    def close(self) -> None:
        try:
            if not self.closed:
                self._sync()
        finally:
            super().close()

    def _sync(self) -> None:
        os.fsync(self.fileno())
        if hasattr(os, "posix_fadvise"):  # not on a Mac
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._synced = self.tell()


def file_digest(path: Path) -> str:
    """Fast, and changes with any byte."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def digest_path(path: Path) -> Path:
    """Where the digest of a checkpoint file is."""
    return path.with_name(f".{path.name}.xxh3")


def not_written(path: Path, error: BaseException) -> RunError:
    """What to say about a checkpoint that couldn't be written."""
    folder = next(parent for parent in path.parents if parent.exists())
    full = shutil.disk_usage(folder).free < 1 << 20
    reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error).splitlines()[0]
    return RunError(
        f"The checkpoint {path} couldn't be written: {reason}. Those before it are as they were; resume from there "
        "with the command that the run printed when it started."
    )


def sync_to_disk(path: Path) -> None:
    """Returns when what was written to a file, or a folder's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path) -> TextIO:
    """Keeps other runs and studies out of a folder, for as long as the file is open.

    Raises:
        RunError: if one is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RunError(f"Another run is writing to {folder}. Wait for its end, or start this one again.") from error
    except OSError as error:  # a file system without locks, as some of clusters are
        reason = f"{folder} can't be locked ({error.strerror}): nothing keeps a second run out of it."
        warnings.warn(reason, stacklevel=2)
    return file


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        sync_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    write_bytes(path, text.encode())


def check_writable(folder: Path, setting: str) -> None:
    """Raises ConfigError unless files can be made in ``folder``; makes it if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"The output folder {folder} can't be written to ({error.strerror}). Choose another with {setting}."
        ) from error
