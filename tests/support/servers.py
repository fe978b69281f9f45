"""vLLM servers as `scripts/serve.sh` starts them."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import torch

from tests.support.commands import ROOT
from tests.support.processes import Group, free_port


class Server(Group):
    """One of a tiny model, with the secret of the environment; its log is beside the model."""

    def __init__(self, model: str, *arguments: str, **environment: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = ["bash", str(ROOT / "scripts" / "serve.sh"), model, str(port), "--max-model-len", "112"]
        command += ["--kv-cache-memory-bytes", "50000000", *arguments]
        alone = {"OMP_NUM_THREADS": "1"}
        if not torch.cuda.is_available():
            # The engine works without a worker, as on a GPU: one process less to start, which is a third of the time.
            command += ["--distributed-executor-backend", "external_launcher"]
            alone |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        super().__init__(command, Path(f"{model}_{port}.log"), **alone, **environment)

    def answers(self) -> bool:
        headers = {"Authorization": f"Bearer {os.environ['VLLM_API_KEY']}"}
        try:
            return httpx.get(f"{self.url}/health", headers=headers).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def ready(*servers: Server) -> Iterator[tuple[Server, ...]]:
    """Servers that are starting, when they answer; none is left at the end."""
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        for server in servers:
            server.until(server.answers, 400)
        yield servers
