"""Ranks: real processes over gloo, which find each other as those of a cluster do.

`Ranks` calls `aspo` and modules of the tests, `in_forks` a function of a test that needs nothing but torch.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch import distributed as dist

from tests.support.commands import ROOT
from tests.support.processes import free_port

LIMIT_S = 500  # of a call


class Ranks:
    """A process for each rank, see fork_server.py, for many calls one after the other.

    The output of a call is in ``folder``, by its name and the rank. ``environment`` is that of all calls. As a context
    manager it leaves no process.
    """

    def __init__(self, number: int, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.calling: list[subprocess.Popen[bytes]] = []
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # select sees all that is there
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
            )
            for _ in range(number)
        ]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def start(
        self,
        name: str,
        arguments: list[str],
        *,
        module: str = "aspo_lightning.cli.main",
        first: int | None = None,
        environments: list[dict[str, str]] | None = None,
        errors: Path | None = None,
    ) -> list[int]:
        """The process ids of a call of a module, which is `aspo`'s, on all ranks or on the ``first``.

        ``environments`` stand for the variables by which ranks find each other; ``errors`` is a file for what one rank
        writes to stderr, which is in its log otherwise.
        """
        self.calling = self.processes[:first]
        if environments is None:
            master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            environments = [{**master, "LOCAL_RANK": str(rank)} for rank in range(len(self.calling))]
            environments = environments if len(environments) > 1 else [{}]  # which has nobody to find
        for rank, (process, environment) in enumerate(zip(self.calling, environments, strict=True)):
            log = str(self.log(name, rank))
            call = {"module": module, "arguments": arguments, "environment": environment, "log": log}
            call["errors"] = errors and str(errors)
            process.stdin.write(f"{json.dumps(call)}\n".encode())
        return self._answers()

    def wait(self) -> list[int]:
        """The exit codes of the last call; minus the signal where one ended it."""
        return self._answers()

    def run(self, name: str, arguments: list[str], **settings) -> None:
        """A call, as ``start`` makes it, until it has ended well."""
        self.start(name, arguments, **settings)
        codes = self.wait()
        assert not any(codes), f"{codes}: {self.text(name)[-5000:]}"

    def log(self, name: str, rank: int = 0) -> Path:
        return self.folder / f"{name}_{rank}.log"

    def text(self, name: str) -> str:
        """All output of a call."""
        return "\n".join(self.log(name, rank).read_text() for rank in range(len(self.calling)))

    def _answers(self) -> list[int]:
        deadline = time.monotonic() + LIMIT_S + 60  # a call ends by itself before, and says where it hung
        lines = []
        for process in self.calling:
            assert select.select([process.stdout], [], [], deadline - time.monotonic())[0], "a rank hangs"
            lines.append(process.stdout.readline())
        assert all(lines), "a rank's process has ended"
        return [int(line) for line in lines]


def in_forks(folder: Path, world_size: int, function: Callable[[int], object]) -> list:
    """What ``function(rank)`` gives, by way of JSON, in so many processes over gloo: this one, and forks of it."""

    def run(rank: int) -> None:
        settings = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=30)}
        dist.init_process_group("gloo", f"file://{folder}/store", **settings)
        try:
            (folder / f"{rank}.json").write_text(json.dumps(function(rank)))
        finally:
            dist.destroy_process_group()

    children = []
    for rank in range(1, world_size):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            run(rank)
            status = 0
        finally:
            os._exit(status)
    try:
        run(0)
    finally:
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0] * len(children)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
