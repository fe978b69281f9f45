"""vLLM servers as `scripts/serve.sh` starts them: by themselves, or in forks of a process that has imported vLLM."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import torch

from tests.support.commands import ROOT
from tests.support.processes import Group, free_port


def command(script: Path, model: str, port: int, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command that starts a server of a tiny model, and its environment."""
    serve = ["bash", str(script), model, str(port), "--max-model-len", "112", "--kv-cache-memory-bytes", "50000000"]
    alone = {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        # The engine works without a worker, as on a GPU: one process less to start, which is a third of the time.
        serve += ["--distributed-executor-backend", "external_launcher"]
        alone |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [*serve, *arguments], alone


class Server(Group):
    """A server of a tiny model, with the secret of the environment; its log is beside the model."""

    def __init__(self, model: str, *arguments: str, **environment: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        serve, alone = command(ROOT / "scripts" / "serve.sh", model, port, *arguments)
        super().__init__(serve, Path(f"{model}_{port}.log"), **alone, **environment)

    def answers(self) -> bool:
        headers = {"Authorization": f"Bearer {os.environ['VLLM_API_KEY']}"}
        try:
            return httpx.get(f"{self.url}/health", headers=headers).status_code == 200
        except httpx.TransportError:
            return False


class Forks:
    """A process that has done the imports of servers, which are most of a start, see vllm_forks.py.

    For vLLM's CPU build alone, whose worker replaces much of torch.cuda when it is imported.
    As a context manager it leaves no process of its own; servers belong to those who start them.
    """

    def __init__(self, folder: Path) -> None:
        """``folder`` gets a link to `scripts/serve.sh` and, where that looks for Python, what prints its call."""
        self.script = folder / "scripts" / "serve.sh"
        python = folder / ".venv" / "bin" / "python"
        for path in (self.script, python):
            path.parent.mkdir(parents=True)
        self.script.symlink_to(ROOT / "scripts" / "serve.sh")
        told = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
        python.write_text(f"#!{sys.executable} -S\n{told}\n")
        python.chmod(0o755)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.vllm_forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def start(self, model: str, port: int, arguments: tuple[str, ...], log: Path) -> int:
        """Starts a server; gives its process id."""
        serve, environment = command(self.script, model, port, *arguments)
        called = subprocess.run(serve, env={**os.environ, **environment}, capture_output=True, check=True)
        (python_m, module, *rest), environment = json.loads(called.stdout)
        assert python_m == "-m"
        call = {"module": module, "arguments": rest, "environment": environment, "log": str(log)}
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(call), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


class ForkedServer(Server):
    """A server in a fork, in a process group of its own."""

    def __init__(self, forks: Forks, model: str, *arguments: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = Path(f"{model}_{port}.log")
        self.process = Fork(forks.start(model, port, arguments, self.log))


class Fork:
    """A process that is another one's child, as far as ``subprocess.Popen`` tells of its own.

    But not the exit code, which is told to the parent alone: it is 0 here.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ends = os.pidfd_open(pid)

    def poll(self) -> int | None:
        return 0 if select.select([self._ends], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self._ends], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return 0


@contextmanager
def ready(*servers: Server) -> Iterator[tuple[Server, ...]]:
    """Servers that are starting, when they answer; none is left at the end."""
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        for server in servers:
            server.until(server.answers, 400)
        yield servers
