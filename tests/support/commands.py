"""``aspo`` as a user calls it."""

import atexit
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aspo_lightning.cli.main import main

if TYPE_CHECKING:
    from tests.support.ranks import Ranks

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


@cache
def _ready() -> "Ranks":
    """A process that has done the slow imports, for all calls of this one."""
    from tests.support.ranks import Ranks  # which imports this module

    ranks = Ranks(1, Path(tempfile.mkdtemp()), HF_HUB_OFFLINE="1")
    atexit.register(ranks.__exit__)
    return ranks


def aspo_forked(*args: str) -> subprocess.CompletedProcess[str]:
    """As ``aspo``, in a fork of a process that has done the slow imports. Lightning can't start ranks from there."""
    ranks = _ready()
    errors = ranks.folder / "errors"
    ranks.start("call", list(args), errors=errors)
    (code,) = ranks.wait()
    return subprocess.CompletedProcess(args, code, ranks.text("call"), errors.read_text())


def aspo_here(monkeypatch, *args: str) -> int | str | None:
    """The exit code of ``aspo`` in this process, which has imported everything already."""
    monkeypatch.setattr(sys, "argv", ["aspo", *args])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code
