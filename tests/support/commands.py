"""``aspo`` as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aspo_lightning.cli.main import main

ROOT = Path(__file__).parent.parent.parent
ASPO = str(Path(sys.executable).with_name("aspo"))


def aspo(*args: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    return subprocess.run(
        [ASPO, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def aspo_here(monkeypatch, *args: str) -> int | str | None:
    """The exit code of ``aspo`` in this process, which has imported everything already."""
    monkeypatch.setattr(sys, "argv", ["aspo", *args])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code
