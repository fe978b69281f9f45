"""Commands in processes of their own, of which none is left at the end; and waiting for something to be so."""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.support.commands import ROOT


def free_port() -> int:
    """A port that nobody listens at, and that the system gives nobody who asks for any: those are above 32768."""
    while True:
        port = random.SystemRandom().randrange(16_384, 32_768)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def eventually(holds: Callable[[], object], seconds: float = 20, every: float = 0.02) -> bool:
    """Whether it holds within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (met := holds()) and time.monotonic() < deadline:
        time.sleep(every)
    return bool(met)


class Group:
    """A command in a process group of its own; all its output goes to ``log``.

    As a context manager it kills what is left of the group at the end.
    """

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_there():
            self.signal(signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float) -> int:
        """The command's exit code."""
        return self.process.wait(seconds)

    def until(self, holds: Callable[[], object], seconds: float) -> None:
        """Returns when it holds; an error if the command ends before, or the time does."""
        met = eventually(lambda: self.process.poll() is not None or holds(), seconds, every=0.1)
        assert met, f"not in {seconds} s: {self.text[-5000:]}"
        assert self.process.poll() is None, f"it has ended: {self.text[-5000:]}"

    def signal(self, number: int) -> None:
        """To all processes of the group."""
        os.killpg(self.process.pid, number)

    def is_there(self) -> bool:
        """Whether any process of the group is."""
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    @property
    def text(self) -> str:
        return self.log.read_text()
