"""Ranks that run `aspo` commands as those of a cluster do, each command in forks after the slow imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.commands import ROOT
from tests.test_fsdp import free_port


class Starters:
    """A process for each rank, see fork_server.py; ``environment`` is theirs and their forks'."""

    def __init__(self, ranks: int, **environment: str) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "support" / "fork_server.py")],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            )
            for _ in range(ranks)
        ]

    def start(self, command: list[str], logs: list[Path]) -> list[int]:
        """The process ids of a command's ranks; each writes to its log."""
        cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if len(self.processes) > 1 else {}
        for rank, (process, log) in enumerate(zip(self.processes, logs, strict=True)):
            environment = {**cluster, "LOCAL_RANK": str(rank)} if cluster else {}
            line = {"command": command, "environment": environment, "log": str(log)}
            print(json.dumps(line), file=process.stdin, flush=True)
        return self._answers()

    def wait(self) -> list[int]:
        """The exit codes of what was started last."""
        return self._answers()

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
            process.wait()

    def _answers(self) -> list[int]:
        return [int(process.stdout.readline()) for process in self.processes]
