"""Ranks that run one `aspo` command after the other, as those of a cluster do, in forks made after the slow imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.test_cli import ROOT
from tests.test_fsdp import free_port


class Ranks:
    """``count`` processes; what each prints is in ``folder``."""

    def __init__(self, count: int, folder: Path, **environment: str) -> None:
        self.folder, self.commands = folder, 0
        self.starters = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "starts.py")],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            )
            for _ in range(count)
        ]

    def run(self, command: list[str]) -> str:
        """What the first rank of a command prints. Fails if one of them does."""
        port = str(free_port())
        self.commands += 1
        logs = [self.folder / f"{self.commands}_{rank}.log" for rank in range(len(self.starters))]
        for rank, (starter, log) in enumerate(zip(self.starters, logs, strict=True)):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
            line = {"command": command, "environment": environment, "log": str(log)}
            print(json.dumps(line), file=starter.stdin, flush=True)
        codes = [[int(starter.stdout.readline()) for _ in ("process id", "exit code")][1] for starter in self.starters]
        assert not any(codes), "\n".join(log.read_text()[-4000:] for log in logs)
        return logs[0].read_text()

    def close(self) -> None:
        for starter in self.starters:
            starter.stdin.close()
            starter.wait()
