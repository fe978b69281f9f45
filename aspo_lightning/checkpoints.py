"""Checkpoints that are written whole or not at all, and finding the one to go on from."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from aspo_lightning.errors import ConfigError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name in the same folder, flushes to disk, and renames.

    Lightning's own also renames, but first holds the whole file in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        crc32 = torch.serialization.get_crc32_options()
        try:
            # By path and without CRCs: a third of the time (1.8 s instead of 6.6 s for 1.6 GB here).
            torch.serialization.set_crc32_options(False)
            torch.save(checkpoint, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            torch.serialization.set_crc32_options(crc32)
            temporary.unlink(missing_ok=True)


def last_checkpoint(root: Path) -> Path:
    """The newest checkpoint of the newest run below ``root`` (``root/version_N/checkpoints/*.ckpt``) that has one.

    Raises:
        ConfigError: if there is none.
    """
    runs = sorted(root.glob("version_*"), key=lambda run: int(re.sub(r"\D", "", run.name) or -1), reverse=True)
    for run in runs:
        checkpoints = [path for path in (run / "checkpoints").glob("*.ckpt") if not path.is_symlink()]
        if checkpoints:
            return max(checkpoints, key=lambda path: (path.stat().st_mtime_ns, path.name))
    raise ConfigError(
        f"--ckpt_path last: no run below {root} has a checkpoint yet. Start one by leaving --ckpt_path out, or give "
        "the path of a checkpoint."
    )
